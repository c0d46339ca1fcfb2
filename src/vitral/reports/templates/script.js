"use strict";
(() => {
  // Tables: a heading becomes a button that sorts by its column.
  const value = (row, at) => {
    const cell = row.cells[at];
    const text = "v" in cell.dataset ? cell.dataset.v : cell.textContent.trim();
    const number = text === "" ? NaN : Number(text);
    return Number.isNaN(number) ? text : number;
  };
  const before = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };
  const sort = (table, at, heading) => {
    const falling = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    rows.sort((a, b) => before(value(a, at), value(b, at)) * (falling ? -1 : 1));
    body.append(...rows);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    Array.from(table.tHead.rows[0].cells).forEach((heading, at) => {
      if (heading.classList.contains("drawn") || !heading.textContent.trim()) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sort(table, at, heading));
      heading.append(button);
    });
  }
  // Maps: one slider a gallery says how strong they lie over their pictures.
  for (const slider of document.querySelectorAll(".slider")) {
    slider.hidden = false;
    const gallery = slider.nextElementSibling;
    slider.querySelector("input").addEventListener("input", (event) => {
      for (const map of gallery.querySelectorAll(".over")) map.style.opacity = event.target.value / 100;
    });
  }
  // Contents stand beside the text where there is room, and are folded where there is not.
  const contents = document.querySelector(".contents");
  if (contents && window.matchMedia("(max-width: 74rem)").matches) contents.open = false;
  // Print shows what is folded.
  window.addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details")) fold.open = true;
  });
})();
