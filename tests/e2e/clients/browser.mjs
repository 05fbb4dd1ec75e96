// A real Chromium, told what to do by lines of JSON and answering with one each. It notes whatever a page complains of.
import fs from "node:fs";
import { createRequire } from "node:module";
import readline from "node:readline";
import { chromium } from "playwright-core";

const [executable] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath: executable, headless: true, args: ["--no-sandbox", "--disable-gpu"] });
const axe = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
let context = null;
let page = null;
let noted = [];
let asked = [];

const orders = {
  async open({ url, ...options }) {
    if (context) await context.close();
    noted = [];
    asked = [];
    context = await browser.newContext({ locale: "en-GB", reducedMotion: "reduce", ...options });
    page = await context.newPage();
    page.on("console", (message) => {
      if (["error", "warning"].includes(message.type())) noted.push(`${message.type()}: ${message.text()} ${message.location().url}`);
    });
    page.on("pageerror", (error) => noted.push(`exception: ${error.message}`));
    page.on("dialog", (dialog) => { noted.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });
    page.on("request", (request) => asked.push(request.url()));
    page.on("response", async (response) => { if (response.status() >= 500) noted.push(`${response.status()} ${response.url()}`); });
    await context.addInitScript(() => {
      document.addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`));
    });
    await page.goto(url);
  },
  go: ({ url }) => page.goto(url).then(() => null),
  back: () => page.goBack().then(() => null),
  reload: () => page.reload().then(() => null),
  click: ({ at }) => page.locator(at).first().click(),
  fill: ({ at, text }) => page.locator(at).first().fill(text),
  select: ({ at, value }) => page.locator(at).first().selectOption(value).then(() => null),
  press: ({ keys }) => page.keyboard.press(keys),
  type: ({ text }) => page.keyboard.type(text),
  text: ({ at }) => page.locator(at).first().innerText(),
  texts: ({ at }) => page.locator(at).allInnerTexts(),
  wait: ({ at, state }) => page.locator(at).first().waitFor({ state: state || "visible", timeout: 20000 }).then(() => null),
  count: ({ at }) => page.locator(at).count(),
  run: ({ code }) => page.evaluate(code),
  tree: ({ at }) => page.locator(at || "body").first().ariaSnapshot(),
  shot: async ({ path, at, full }) => {
    if (at) await page.locator(at).first().screenshot({ path });
    else await page.screenshot({ path, fullPage: Boolean(full) });
  },
  axe: async () => {
    await page.evaluate(axe);
    const found = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
    return found.violations.map((v) => `${v.id}: ${v.help}: ${v.nodes.map((n) => n.target.join(" ")).slice(0, 4).join(", ")}`);
  },
  noted: () => noted,
  asked: () => asked,
  address: () => page.url(),
};

console.log(JSON.stringify({ version: browser.version() }));
for await (const line of readline.createInterface({ input: process.stdin })) {
  const { do: what, ...order } = JSON.parse(line);
  try {
    console.log(JSON.stringify({ got: (await orders[what](order)) ?? null }));
  } catch (error) {
    console.log(JSON.stringify({ error: String(error.message).slice(0, 2000) }));
  }
}
await browser.close();
