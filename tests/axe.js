// Opens a page in Chromium at both schemes and two widths; prints, as JSON, axe-core's violations, what the
// page asked of the network, what it complained of, and whether it is wider than the window.
"use strict";
const fs = require("fs");
const puppeteer = require("puppeteer-core");

const [, , page, chromium] = process.argv;
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

async function look(browser, scheme, width, scripted) {
  const tab = await browser.newPage();
  const requests = [], complaints = [];
  tab.on("request", (request) => request.url().startsWith("data:") || requests.push(request.url()));
  tab.on("console", (message) => complaints.push(message.text()));
  tab.on("pageerror", (error) => complaints.push(error.message));
  await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await tab.setViewport({ width, height: 900 });
  await tab.setJavaScriptEnabled(scripted);
  await tab.goto(`file://${page}`);
  const opened = requests.length;
  const wide = await tab.evaluate(() => document.documentElement.scrollWidth > window.innerWidth);
  const broken = await tab.evaluate(async () => {
    const images = Array.from(document.images);
    await Promise.all(images.map((image) => image.decode().catch(() => null)));
    return images.filter((image) => !image.naturalWidth).length;
  });
  await tab.evaluate(() => document.querySelectorAll("details").forEach((fold) => (fold.open = true)));
  let violations = [];
  if (scripted) {
    await tab.setBypassCSP(true); // axe is a script of ours, which the page's own policy keeps out
    await tab.reload();
    await tab.evaluate(() => document.querySelectorAll("details").forEach((fold) => (fold.open = true)));
    await tab.evaluate(axe);
    const found = await tab.evaluate(() => axe.run({ resultTypes: ["violations"] }));
    violations = found.violations.map((each) => `${each.id}: ${each.help} (${each.nodes[0].html.slice(0, 200)})`);
  }
  const words = await tab.evaluate(() => document.body.innerText.length);
  await tab.close();
  return { scheme, width, scripted, opened, wide, broken, words, complaints, violations };
}

(async () => {
  const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox", "--disable-gpu"] });
  const seen = [];
  for (const scheme of ["light", "dark"]) {
    for (const width of [1400, 400]) seen.push(await look(browser, scheme, width, true));
  }
  seen.push(await look(browser, "light", 400, false));
  await browser.close();
  console.log(JSON.stringify(seen));
})();
