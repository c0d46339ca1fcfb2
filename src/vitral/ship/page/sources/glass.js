// The picture as a stained-glass window: a pane for each patch, between lines of lead, and light that falls
// through some panes more than through others.

const BORDER = 0.058; // of the longer side: the band of small panes around the picture
const LEAD = [22, 21, 26];
const AMBER = [255, 172, 36];
const BLUE = [44, 116, 255];

/** The same number for the same seed, 0..1: panes keep their grain when they are drawn again. */
function grain(seed) {
  const value = Math.sin(seed * 127.1 + 311.7) * 43758.5453;
  return value - Math.floor(value);
}

const rgb = (colour, alpha = 1) => `rgba(${colour.map(Math.round)}, ${alpha})`;

/** A colour further from grey, and darker or lighter. */
function richer(colour, saturation, brightness = 1) {
  const grey = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2];
  return colour.map((part) => clamp((grey + (part - grey) * saturation) * brightness, 0, 255));
}

/** The mean colour of each pane of RGB bytes, by rows. */
function meanColours({ width, height, data }, [rows, columns]) {
  const sums = Array.from({ length: rows * columns }, () => [0, 0, 0, 0]);
  for (let y = 0; y < height; y += 1) {
    const row = Math.floor((y * rows) / height) * columns;
    for (let x = 0; x < width; x += 1) {
      const sum = sums[row + Math.floor((x * columns) / width)];
      const at = (y * width + x) * 3;
      for (let channel = 0; channel < 3; channel += 1) sum[channel] += data[at + channel];
      sum[3] += 1;
    }
  }
  return sums.map(([red, green, blue, count]) => [red / count, green / count, blue / count]);
}

class Glass {
  /** @param canvas where the window is drawn; @param floor a canvas for the light that falls on the floor */
  constructor(canvas, floor) {
    Object.assign(this, { canvas, floor, picture: null, marked: null, frame: 0 });
    new ResizeObserver(() => this.fit()).observe(canvas.parentElement);
  }

  /** Shows a picture, RGB bytes, with its patches (rows, columns), all of it lit. */
  show(picture, grid) {
    Object.assign(this, { picture, grid, marked: null, signed: false });
    this.colours = meanColours(picture, grid);
    this.source = asCanvas(picture);
    this.light = this.wanted = new Float32Array(grid[0] * grid[1]).fill(1);
    this.fit();
  }

  /** Lights panes: numbers 0..1, or -1..1 if `signed`, amber above zero and blue below. `marked`: a pane. */
  shine(light, { signed = false, marked = null } = {}) {
    if (signed !== this.signed || wantsStillness()) this.light = light;
    Object.assign(this, { wanted: light, signed, marked });
    this.move();
  }

  /** Lights all panes. */
  rest() {
    this.shine(new Float32Array(this.colours.length).fill(1));
  }

  /** The pane at a place of the canvas in CSS pixels, or null. */
  paneAt(x, y) {
    if (!this.picture) return null;
    const scale = this.canvas.width / this.canvas.clientWidth;
    const column = Math.floor((x * scale - this.left) / this.cellWidth);
    const row = Math.floor((y * scale - this.top) / this.cellHeight);
    const inside = row >= 0 && column >= 0 && row < this.grid[0] && column < this.grid[1];
    return inside ? row * this.grid[1] + column : null;
  }

  // --- Sizes and time ------------------------------------------------------------------------------

  fit() {
    const space = this.canvas.parentElement.clientWidth;
    if (!this.picture || !space) return;
    const { width, height } = this.picture;
    const longer = Math.max(width, height);
    const most = Math.min(space, (innerHeight * 0.72 * (width + 2 * BORDER * longer)) / height);
    const scale = Math.min(devicePixelRatio || 1, 2);
    this.canvas.width = Math.round(most * scale);
    const band = (BORDER * longer * this.canvas.width) / (width + 2 * BORDER * longer);
    this.left = this.top = band;
    this.cellWidth = (this.canvas.width - 2 * band) / this.grid[1];
    this.cellHeight = ((this.cellWidth * this.grid[1]) / width) * (height / this.grid[0]);
    this.canvas.height = Math.round(this.cellHeight * this.grid[0] + 2 * band);
    this.canvas.style.width = `${most}px`;
    const cell = Math.min(this.cellWidth, this.cellHeight);
    this.came = clamp(cell * 0.07, 0.9 * scale, 4.5 * scale);
    this.glass = this.layer((pen) => this.paintGlass(pen));
    this.leads = this.layer((pen) => this.paintLeads(pen, cell > 14 * scale));
    this.draw();
  }

  layer(paint) {
    const canvas = make("canvas", { width: this.canvas.width, height: this.canvas.height });
    paint(canvas.getContext("2d"));
    return canvas;
  }

  /** Lets the light drift to where it is wanted, in a fifth of a second. */
  move() {
    cancelAnimationFrame(this.frame);
    const from = this.light;
    const begin = performance.now();
    const step = (now) => {
      const share = wantsStillness() ? 1 : clamp((now - begin) / 180, 0, 1);
      const eased = share * (2 - share);
      this.light = this.wanted.map((value, pane) => from[pane] + (value - from[pane]) * eased);
      this.draw();
      if (share < 1) this.frame = requestAnimationFrame(step);
    };
    this.frame = requestAnimationFrame(step);
  }

  // --- What is drawn -------------------------------------------------------------------------------

  box(pane) {
    const row = Math.floor(pane / this.grid[1]);
    const column = pane % this.grid[1];
    return [this.left + column * this.cellWidth, this.top + row * this.cellHeight, this.cellWidth, this.cellHeight];
  }

  draw() {
    if (!this.glass) return;
    const pen = this.canvas.getContext("2d");
    pen.globalCompositeOperation = "source-over";
    pen.drawImage(this.glass, 0, 0);
    const dimmed = this.signed || this.light.some((value) => value < 0.999);
    if (dimmed) this.dimBorder(pen);
    this.light.forEach((value, pane) => this.lightPane(pen, pane, value));
    if (dimmed) this.bloom(pen);
    pen.drawImage(this.leads, 0, 0);
    if (this.marked !== null) this.mark(pen, this.marked);
    this.throwOnFloor();
  }

  lightPane(pen, pane, value) {
    const strength = Math.abs(value);
    if (!this.signed && strength > 0.999) return;
    const box = this.box(pane);
    pen.fillStyle = `rgba(9, 9, 15, ${(this.signed ? 0.66 : 0.88) * (1 - strength)})`;
    pen.fillRect(...box);
    if (!this.signed) return;
    pen.fillStyle = rgb(value > 0 ? AMBER : BLUE, 0.58 * strength);
    pen.fillRect(...box);
  }

  dimBorder(pen) {
    pen.save();
    pen.beginPath();
    pen.rect(0, 0, this.canvas.width, this.canvas.height);
    pen.rect(this.left, this.top, this.cellWidth * this.grid[1], this.cellHeight * this.grid[0]);
    pen.clip("evenodd");
    pen.fillStyle = "rgba(9, 9, 15, 0.62)";
    pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    pen.restore();
  }

  /** Bright panes spill over their lead. */
  bloom(pen) {
    const [rows, columns] = this.grid;
    const small = make("canvas", { width: columns, height: rows });
    const dots = small.getContext("2d");
    this.light.forEach((value, pane) => {
      const colour = this.signed ? (value > 0 ? AMBER : BLUE) : richer(this.colours[pane], 1.3, 1.15);
      dots.fillStyle = rgb(colour, Math.abs(value) ** 1.6);
      dots.fillRect(pane % columns, Math.floor(pane / columns), 1, 1);
    });
    pen.save();
    pen.globalCompositeOperation = "screen";
    pen.globalAlpha = 0.3;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(small, this.left, this.top, this.cellWidth * columns, this.cellHeight * rows);
    pen.restore();
  }

  mark(pen, pane) {
    pen.save();
    pen.strokeStyle = "#fff3cf";
    pen.lineWidth = Math.max(this.came * 1.1, 2);
    pen.shadowColor = "#ffcf5c";
    pen.shadowBlur = this.came * 5;
    pen.strokeRect(...this.box(pane));
    pen.strokeRect(...this.box(pane));
    pen.restore();
  }

  throwOnFloor() {
    const pen = this.floor.getContext("2d");
    this.floor.width = 64;
    this.floor.height = 32;
    pen.translate(0, this.floor.height);
    pen.scale(1, -1);
    pen.drawImage(this.canvas, 0, 0, this.floor.width, this.floor.height);
  }

  // --- Glass and lead, drawn once for each picture and size ------------------------------------------

  paintGlass(pen) {
    const { width, height } = this.canvas;
    pen.fillStyle = rgb(LEAD);
    pen.fillRect(0, 0, width, height);
    const inner = [this.left, this.top, this.cellWidth * this.grid[1], this.cellHeight * this.grid[0]];
    pen.imageSmoothingQuality = "high";
    pen.drawImage(this.source, ...inner);
    pen.globalCompositeOperation = "saturation";
    pen.fillStyle = "rgba(255, 0, 0, 0.34)";
    pen.fillRect(...inner);
    pen.globalCompositeOperation = "source-over";
    this.colours.forEach((colour, pane) => this.paintPane(pen, this.box(pane), richer(colour, 1.45, 1.06), 0.36, pane));
    this.paintBorder(pen);
    this.paintGrain(pen);
    this.paintDay(pen);
  }

  /** Daylight behind the glass, brightest above the middle. */
  paintDay(pen) {
    const { width, height } = this.canvas;
    const sky = pen.createRadialGradient(width / 2, height * 0.32, 0, width / 2, height * 0.32, height * 0.85);
    sky.addColorStop(0, "rgba(255, 250, 235, 0.5)");
    sky.addColorStop(0.55, "rgba(255, 250, 235, 0.12)");
    sky.addColorStop(1, "rgba(0, 0, 20, 0.22)");
    pen.save();
    pen.globalCompositeOperation = "soft-light";
    pen.fillStyle = sky;
    pen.fillRect(0, 0, width, height);
    pen.restore();
  }

  /** One pane: its colour laid over what is there, uneven as glass is, and darker towards the lead. */
  paintPane(pen, [x, y, width, height], colour, alpha, seed) {
    pen.fillStyle = rgb(colour, alpha);
    pen.fillRect(x, y, width, height);
    const angle = grain(seed) * Math.PI;
    const across = [Math.cos(angle) * width * 0.6, Math.sin(angle) * height * 0.6];
    const [cx, cy] = [x + width / 2, y + height / 2];
    const uneven = pen.createLinearGradient(cx - across[0], cy - across[1], cx + across[0], cy + across[1]);
    uneven.addColorStop(0, `rgba(255, 255, 255, ${0.1 + 0.1 * grain(seed + 0.5)})`);
    uneven.addColorStop(0.5, "rgba(255, 255, 255, 0)");
    uneven.addColorStop(1, `rgba(0, 0, 10, ${0.1 + 0.14 * grain(seed + 0.7)})`);
    pen.fillStyle = uneven;
    pen.fillRect(x, y, width, height);
    pen.strokeStyle = "rgba(0, 0, 0, 0.2)";
    pen.lineWidth = this.came * 2.1;
    pen.strokeRect(x, y, width, height);
  }

  /** A band of small panes, in the colours of the picture's own edge. */
  paintBorder(pen) {
    this.borderBoxes().forEach(({ box, colour, corner }, index) => {
      const tone = richer(colour, 1.7, corner ? 0.95 : 0.62 + 0.22 * (index % 2));
      this.paintPane(pen, box, tone, 1, 7 * index + 3);
    });
  }

  borderBoxes() {
    const [rows, columns] = this.grid;
    const [right, bottom] = [this.left + this.cellWidth * columns, this.top + this.cellHeight * rows];
    const boxes = [];
    const along = (count, cell, place, colourOf) => {
      const pieces = Math.max(Math.round((count * cell) / (2.6 * this.left)), 1);
      for (let piece = 0; piece < pieces; piece += 1) {
        const [from, to] = [(piece * count) / pieces, ((piece + 1) * count) / pieces];
        const middle = clamp(Math.floor((from + to) / 2), 0, count - 1);
        boxes.push(...place(from * cell, (to - from) * cell).map((box, side) => ({
          box, colour: this.colours[colourOf(middle)[side]], corner: false,
        })));
      }
    };
    along(columns, this.cellWidth,
      (at, long) => [[this.left + at, 0, long, this.top], [this.left + at, bottom, long, this.top]],
      (column) => [column, (rows - 1) * columns + column]);
    along(rows, this.cellHeight,
      (at, long) => [[0, this.top + at, this.left, long], [right, this.top + at, this.left, long]],
      (row) => [row * columns, row * columns + columns - 1]);
    const corners = [[0, 0, 0], [right, 0, columns - 1], [0, bottom, (rows - 1) * columns], [right, bottom, rows * columns - 1]];
    corners.forEach(([x, y, pane]) => boxes.push({ box: [x, y, this.left, this.top], colour: this.colours[pane], corner: true }));
    return boxes;
  }

  /** Fine streaks and bubbles over all of it. */
  paintGrain(pen) {
    const tile = make("canvas", { width: 192, height: 192 });
    const dots = tile.getContext("2d");
    for (let index = 0; index < 900; index += 1) {
      dots.fillStyle = grain(index) > 0.5 ? "rgba(255, 255, 255, 0.05)" : "rgba(0, 0, 0, 0.05)";
      dots.fillRect(grain(index + 0.1) * 192, grain(index + 0.2) * 192, 1 + grain(index + 0.3) * 2, 4 + grain(index + 0.4) * 26);
    }
    pen.save();
    pen.globalCompositeOperation = "soft-light";
    pen.fillStyle = pen.createPattern(tile, "repeat");
    pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    pen.restore();
  }

  paintLeads(pen, joints) {
    const [rows, columns] = this.grid;
    const [right, bottom] = [this.left + this.cellWidth * columns, this.top + this.cellHeight * rows];
    const lines = [];
    for (let row = 1; row < rows; row += 1) {
      lines.push([this.left, this.top + row * this.cellHeight, right, this.top + row * this.cellHeight]);
    }
    for (let column = 1; column < columns; column += 1) {
      lines.push([this.left + column * this.cellWidth, this.top, this.left + column * this.cellWidth, bottom]);
    }
    this.strokeLead(pen, lines, this.came);
    if (joints) this.paintJoints(pen);
    this.borderBoxes().forEach(({ box, corner }) => {
      this.strokeBox(pen, box, this.came * 0.9);
      if (corner) this.paintRoundel(pen, box);
    });
    this.strokeBox(pen, [this.left, this.top, right - this.left, bottom - this.top], this.came * 1.7);
    pen.strokeStyle = rgb(LEAD);
    pen.lineWidth = this.came * 4;
    pen.strokeRect(0, 0, this.canvas.width, this.canvas.height);
  }

  strokeBox(pen, [x, y, width, height], thick) {
    const lines = [[x, y, x + width, y], [x + width, y, x + width, y + height], [x, y + height, x + width, y + height], [x, y, x, y + height]];
    this.strokeLead(pen, lines, thick);
  }

  /** Dark lead with a thin shine along it. */
  strokeLead(pen, lines, thick) {
    pen.lineCap = "round";
    for (const [colour, share, shift] of [[rgb(LEAD), 1, 0], ["rgba(150, 152, 165, 0.5)", 0.22, -0.16]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = thick * share;
      pen.beginPath();
      for (const [x0, y0, x1, y1] of lines) {
        pen.moveTo(x0 + shift * thick, y0 + shift * thick);
        pen.lineTo(x1 + shift * thick, y1 + shift * thick);
      }
      pen.stroke();
    }
  }

  /** Solder where lines of lead meet. */
  paintJoints(pen) {
    for (let row = 1; row < this.grid[0]; row += 1) {
      for (let column = 1; column < this.grid[1]; column += 1) {
        const [x, y] = [this.left + column * this.cellWidth, this.top + row * this.cellHeight];
        this.dot(pen, x, y, this.came * (0.85 + 0.25 * grain(row * 31 + column)), rgb(LEAD));
        this.dot(pen, x - this.came * 0.2, y - this.came * 0.2, this.came * 0.26, "rgba(160, 162, 175, 0.45)");
      }
    }
  }

  paintRoundel(pen, [x, y, width, height]) {
    pen.lineWidth = this.came * 0.8;
    pen.strokeStyle = rgb(LEAD);
    pen.beginPath();
    pen.arc(x + width / 2, y + height / 2, width * 0.3, 0, 2 * Math.PI);
    pen.fillStyle = "rgba(255, 255, 255, 0.14)";
    pen.fill();
    pen.stroke();
  }

  dot(pen, x, y, radius, colour) {
    pen.fillStyle = colour;
    pen.beginPath();
    pen.arc(x, y, radius, 0, 2 * Math.PI);
    pen.fill();
  }
}
