// With BASE_URL that is the page's address. Without it the servers are started here, or those that run are taken: this file is
// read in every worker, and again when the suite runs again.
const { execFileSync } = require("node:child_process");
const { defineConfig } = require("@playwright/test");

const serve = (name, ...words) =>
  execFileSync("portexec", ["--detach", "--reuse", "--name", name, ...words], { encoding: "utf8" }).trim();

const start = () => {
  const api = serve("api", "--", "node", "api.js");
  return serve("web", "-e", `API_URL=${api}`, "--", "node", "web.js");
};

module.exports = defineConfig({
  testMatch: "*.spec.js",
  reporter: "list",
  workers: 1,
  timeout: 120_000,
  expect: { timeout: 30_000 },
  use: {
    baseURL: process.env.BASE_URL || start(),
    launchOptions: {
      executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
      args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
    },
  },
});
