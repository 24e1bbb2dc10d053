// Look at a page in Chromium on a desktop and on a phone, in light and in dark, and print what was found as JSON.
// node look.mjs CHROMIUM PAGE [FOLDER]: with a folder, pictures of each first screen and of each whole page go there.
import puppeteer from "puppeteer-core";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [, , executablePath, file, pictures] = process.argv;
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"] });

/** What sticks out of the window without a box of its own to scroll in. */
function overflow() {
  const boxed = (element) => {
    for (let each = element.parentElement; each; each = each.parentElement) {
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(each).overflowX)) return true;
    }
    return false;
  };
  return [...document.querySelectorAll("body *")]
    .filter((each) => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest("svg") && !boxed(each))
    .map((each) => each.outerHTML.slice(0, 120));
}

const looks = [];
for (const [width, height] of [[1280, 900], [390, 844]]) {
  for (const scheme of ["light", "dark"]) {
    const page = await browser.newPage();
    const errors = [];
    page.on("pageerror", (error) => errors.push(error.message));
    page.on("request", (request) => {
      if (!/^(file|data):/.test(request.url())) errors.push(`asks the network for ${request.url()}`);
    });
    await page.setViewport({ width, height });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await page.goto(pathToFileURL(file).href);
    const picture = (name) => (pictures ? page.screenshot({ path: join(pictures, name), fullPage: name.includes("whole") }) : null);
    await picture(`${width}-${scheme}.png`);
    const front = await page.$eval("header", (header) => header.getBoundingClientRect().bottom);
    const folded = await page.$$eval("details.section:not([open])", (parts) => parts.length);
    // A mark of the first figure says what it is.
    const mark = await page.$("header svg g:has(> title) use");
    const box = mark && (await mark.boundingBox());
    let hover = null;
    if (box) {
      await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
      hover = await page.$eval("#hover", (shown) => (shown.hidden ? null : shown.textContent));
    }
    // The last line of the contents opens its part.
    const opened = await page.evaluate(async () => {
      const link = [...document.querySelectorAll("nav a")].pop();
      if (!link || !link.offsetParent) return null;
      link.click();
      await new Promise((done) => setTimeout(done, 100));
      return document.querySelector(link.getAttribute("href")).open;
    });
    await page.evaluate(() => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
    // A click on the name of a column sorts by it.
    const sorted = await page.evaluate(() => {
      const table = document.querySelector("table.sortable");
      if (!table) return null;
      const column = [...table.querySelectorAll("th")].findIndex((head) => ["score", "fused", "mean"].includes(head.textContent));
      table.querySelectorAll("th button")[column].click();
      return [...table.tBodies[0].rows].map((row) => parseFloat(row.cells[column].textContent));
    });
    await picture(`${width}-${scheme}-whole.png`);
    const sticksOut = await page.evaluate(overflow);
    const scrolls = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => globalThis.axe.run());
    const faults = violations.flatMap((rule) => rule.nodes.map((node) => `${rule.id}: ${node.html.slice(0, 160)}`));
    looks.push({ width, height, scheme, front, folded, hover, opened, sorted, scrolls, sticksOut, faults, errors });
    await page.close();
  }
}
await browser.close();
console.log(JSON.stringify(looks));
