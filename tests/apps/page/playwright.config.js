// The suite finds its server by BASE_URL and nothing else: there is no number here, and no `webServer`.
const { defineConfig } = require("@playwright/test");

module.exports = defineConfig({
  testMatch: "*.spec.js",
  reporter: "list",
  forbidOnly: true,
  // The checks share one guest list and run one after another; copies of the whole suite run side by side.
  workers: 1,
  // Long, for a machine with much else to do; nothing that is checked takes this time.
  timeout: 120_000,
  expect: { timeout: 30_000 },
  use: {
    baseURL: process.env.BASE_URL,
    launchOptions: {
      executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
      // Nothing but the server under test is talked to. --no-sandbox: root, in a container, has none.
      args: [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
      ],
    },
  },
});
