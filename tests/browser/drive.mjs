// Opens one page in Chromium with the network blocked, plays the steps given on stdin as JSON, and
// prints what it saw. stdin: {url, browser, viewport, dark, frame, serve, init, steps: [[name, ...arguments], ...]}
// stdout: {results, errors, requests}. `frame` names an iframe in which the steps are played, or the
// way to it from frame to frame; `serve` maps addresses to local files that stand in for the network.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const job = JSON.parse(readFileSync(0, "utf8"));
const browser = await chromium.launch({
  executablePath: job.browser,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const seen = { results: [], errors: [], requests: [] };
try {
  const context = await browser.newContext({
    viewport: job.viewport ?? { width: 1400, height: 900 },
    colorScheme: job.dark ? "dark" : "light",
    acceptDownloads: true,
  });
  await context.route("**/*", (route) => {
    const url = route.request().url();
    if (/^(file|data|blob|about):/.test(url)) return route.continue();
    const local = Object.entries(job.serve ?? {}).find(([start]) => url.startsWith(start));
    if (local) return route.fulfill({ path: local[1] });
    seen.requests.push(url);
    return route.abort();
  });
  const page = await context.newPage();
  page.on("console", (message) => {
    if (message.type() === "error") seen.errors.push(`${message.text()} (${message.location().url})`);
  });
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  page.on("dialog", (dialog) => { seen.errors.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });
  if (job.init) await page.addInitScript(job.init);
  await page.goto(job.url, { timeout: job.timeout ?? 30000 });
  let target = page;
  for (const frame of [job.frame ?? []].flat()) target = await (await target.waitForSelector(frame)).contentFrame();
  const play = {
    ready: () => target.waitForSelector("html[data-ready]", { state: "attached" }).then(() => target.evaluate(() => Number(document.documentElement.dataset.ready))),
    click: (selector) => target.click(selector),
    hover: (selector, position) => target.hover(selector, { position }),
    press: (key) => page.keyboard.press(key),
    wheel: (down) => page.mouse.wheel(0, down),
    fill: (selector, text) => target.fill(selector, text).then(() => target.dispatchEvent(selector, "change")),
    choose: (selector, value) => target.selectOption(selector, value),
    focus: (selector) => target.focus(selector),
    text: (selector) => target.innerText(selector),
    texts: (selector) => target.$$eval(selector, (nodes) => nodes.map((node) => node.textContent)),
    eval: (expression) => target.evaluate(expression),
    wait: (milliseconds) => page.waitForTimeout(milliseconds),
    shot: (path, fullPage) => page.screenshot({ path, fullPage: Boolean(fullPage) }).then(() => null),
    download: async (selector) => {
      const [file] = await Promise.all([page.waitForEvent("download"), target.click(selector)]);
      const bytes = readFileSync(await file.path());
      return { name: file.suggestedFilename(), size: bytes.length, start: bytes.subarray(0, 4000).toString("utf8") };
    },
    axe: async () => {
      await target.evaluate(axe);
      const { violations } = await target.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
      return violations.map(({ id, impact, nodes }) => ({ id, impact, where: nodes.slice(0, 4).map((n) => `${n.target}: ${n.failureSummary}`) }));
    },
  };
  for (const [name, ...rest] of job.steps) seen.results.push((await play[name](...rest)) ?? null);
} catch (error) {
  seen.errors.push(`driver: ${error.message}`);
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
