// The page of this worktree asks the API of this worktree; and each server has its cookies under its own name.
const { expect, test } = require("@playwright/test");

const here = process.cwd();

test(`the page of ${here} asks its own API`, async ({ page }) => {
  await page.goto("/");
  expect(await page.getByRole("heading").textContent()).toBe(here);
  await expect(page.getByRole("status")).toHaveText(here);
});

test(`names keep cookies apart in ${here}`, async ({ page, baseURL, request }) => {
  const web = new URL(baseURL);
  await page.goto("/");
  // The script asks after the page is there.
  const asked = await page.waitForFunction(() => performance.getEntriesByType("resource").at(-1)?.name);
  const api = new URL(await asked.jsonValue());
  const cookies = async (url) => (await page.goto(url.href), page.evaluate(() => document.cookie));
  await cookies(api);
  expect(await cookies(web)).toBe("of=api"); // by number one host is like another
  api.hostname = "api.localhost";
  web.hostname = "web.localhost";
  expect(await cookies(api)).toBe("of=api");
  expect(await cookies(web)).toBe("");
});
