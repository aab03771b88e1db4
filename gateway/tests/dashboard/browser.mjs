// Drives the dashboard in headless Chromium for `tests/dashboard.rs`.
//
// Prints one line of JSON for each step, so that the test can act between two steps. Arguments: the
// URL of the dashboard, the URL of one that needs the token `right`, and a directory for pictures
// (empty: none). The directory of `node_modules` is in TOOLS.

import { createRequire } from "node:module";

const require = createRequire(`${process.env.TOOLS}/`);
const { chromium } = require("playwright-core");
const axe = require("axe-core").source;

const [base, locked, pictures] = process.argv.slice(2);
/// Any state is shown within this time, also on a busy machine.
const TIMEOUT = 20000;
const DESKTOP = { width: 1280, height: 800 };
const PHONE = { width: 390, height: 844 };

const report = (step, facts = {}) => console.log(JSON.stringify({ step, time: Date.now() / 1000, ...facts }));

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
const faults = [];
const foreign = [];

async function open(url, options = {}) {
  const page = await browser.newPage({ bypassCSP: false, viewport: DESKTOP, ...options });
  page.setDefaultTimeout(TIMEOUT);
  page.on("pageerror", error => faults.push(String(error)));
  page.on("console", message => {
    // Chromium reports each answer 401 as an error.
    if (message.type() === "error" && !message.text().includes("401")) faults.push(message.text());
  });
  page.on("request", request => { if (new URL(request.url()).origin !== new URL(url).origin) foreign.push(request.url()); });
  await page.goto(url);
  return page;
}

const text = (page, selector, wanted) => page.waitForFunction(
  ([selector, wanted]) => [...document.querySelectorAll(selector)].some(node => new RegExp(wanted).test(node.textContent)),
  [selector, wanted], { polling: 50 });

async function check(page, name) {
  // The script of axe is not one of the page's: it is evaluated, not loaded.
  await page.evaluate(axe);
  const result = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  return result.violations.map(({ id, nodes }) => `${name}: ${id}: ${nodes.slice(0, 3).map(node => node.html).join(" ")}`);
}

async function picture(page, name) {
  await page.evaluate(() => globalThis.scrollTo(0, 0));
  if (pictures) await page.screenshot({ path: `${pictures}/${name}.png`, fullPage: true });
}

const isWithinWidth = page => page.evaluate(() => document.documentElement.scrollWidth <= document.documentElement.clientWidth);

const page = await open(base);
await text(page, "#routes-table tbody tr", "^shop.*[1-9]");
await text(page, "#breaker-cards .card", "failing.*open");
await text(page, "#denials-table thead tr", "Denials.*First.*Last");
await text(page, "#denials-table tbody tr", "^[0-9a-f]{16}.*device[1-9]");
await text(page, "#endpoints-table thead tr", "Sent/s.*Received/s.*Retried.*Sent.*Received");
await text(page, "#endpoints-table tbody tr", "available.*[1-9][0-9.]* (B|KiB|MiB)");
await text(page, "#shards-table tbody tr", "up");
await text(page, "#certificates-table tbody tr", "tls.crt.*gate.test");
await page.locator("#explain-ip").fill("127.0.0.1");
await page.locator("#explain button").click();
await text(page, "#explain-table tbody tr", "device");
await page.locator("#purge-value").fill(process.env.PURGED);
await page.locator("#purge button").click();
await text(page, "#purge-result", "Purged");
await page.locator("#override-rule").selectOption("device");
await page.locator("#override-mode").selectOption("shadow");
await page.locator("#override button[type=submit]").click();
await page.locator("#confirm-yes").click();
await text(page, "#override-result", "Done");
await text(page, "#limits-table tbody tr", "^device.*shadow \\(by hand");
await page.locator("#override-clear").click();
await text(page, "#limits-table tbody tr", "^device(?!.*by hand)");
report("tools");
await picture(page, "ready");
report("ready", { address: page.url() });

// The test stops an endpoint and a shard now.
await Promise.all([
  text(page, "#endpoints-table tbody tr", "(out|unreachable|ejected)(?!.*available)").then(() => report("endpoint")),
  text(page, "#shards-table tbody tr", "down").then(() => report("shard")),
]);
await text(page, "#problem-list li", "^Endpoint .* is out");
await text(page, "#problem-list li", "^Shard .* is down");
await text(page, "#log-lines li", "shard down");

// Focus stays on a button while the page changes.
const button = page.locator("#breaker-cards .card", { hasText: "failing" }).getByRole("button", { name: /^Close/ });
await button.focus();
await page.waitForTimeout(1500);
const hasFocus = await button.evaluate(node => node === document.activeElement);
await page.keyboard.press("Enter");
await page.locator("#confirm[open]").waitFor();
await page.keyboard.press("Escape");
await button.click();
await page.locator("#confirm-yes").click();
await text(page, "#breaker-cards .card", "failing.*set by hand");
report("breaker", { hasFocus });

// The test writes a configuration with a fault now.
await text(page, "#problem-list li", "configuration is refused.*unknown");
await text(page, "#faults li", "error: line");
report("refused");

await page.waitForSelector("#charts .chart path[d^=M]");
await page.locator("#filter").fill("no such name");
await text(page, "#routes-table tbody tr", "No route");
await page.locator("#filter").fill("");

const violations = [];
const overflows = [];
for (const [name, viewport] of [["desktop", DESKTOP], ["phone", PHONE]]) {
  for (const colorScheme of ["light", "dark"]) {
    await page.setViewportSize(viewport);
    await page.emulateMedia({ colorScheme });
    await picture(page, `${name}-${colorScheme}`);
    if (!(await isWithinWidth(page))) overflows.push(name);
    // Colours depend on the scheme alone.
    if (viewport === PHONE && colorScheme === "light") continue;
    violations.push(...(await check(page, `${name} ${colorScheme}`)));
  }
}
report("looks", { violations, overflows });

const login = await open(locked);
await login.locator("#token").fill("wrong");
await login.locator("#login button").click();
await text(login, "#login-fault", "not accepted");
violations.push(...(await check(login, "login")));
await login.locator("#token").fill("right");
await login.keyboard.press("Enter");
await text(login, "#state", "well");
report("login", { violations });

// The test ends the gateway now.
report("end");
await text(page, "#state", "does not answer");
report("done", { faults: faults.filter(fault => !fault.includes("ERR_")), foreign });
await browser.close();
