// What a user does with the page, in a real browser. Each check also sees to it that INSTANCE answers and no other server.
const { expect, test } = require("@playwright/test");

const instance = process.env.INSTANCE;
const status = (page) => page.getByRole("status");

// There is one guest list for all checks: they follow each other, and what comes after a failure says nothing.
test.describe.configure({ mode: "serial" });

test.beforeEach(async ({ page }) => {
  await page.goto("/");
  expect(await page.getByRole("heading").textContent()).toBe(`Guest list of ${instance}`);
  await expect(status(page)).toContainText("says");
});

test(`the script of ${instance} asks ${instance}`, async ({ page }) => {
  await expect(status(page)).toHaveText(`guests: 0, says ${instance}`);
});

test(`a guest is added at ${instance}`, async ({ page }) => {
  const answered = page.waitForResponse((response) => response.request().method() === "POST");
  await page.getByLabel("Name").fill(`a friend of ${instance}`);
  await page.getByRole("button", { name: "Add" }).click();
  expect((await answered).status()).toBe(200);
  await expect(status(page)).toHaveText(`guests: 1, says ${instance}`);
});

test(`the guest is still there at ${instance}`, async ({ page }) => {
  // This guest alone: another copy of the suite adds its own, to its own server.
  await expect(page.getByRole("listitem")).toHaveText([`a friend of ${instance}`]);
});
