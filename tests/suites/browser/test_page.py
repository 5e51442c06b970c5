"""Selenium, with a driver and a site that are both servers of the suite."""

from __future__ import annotations

import os

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By


@pytest.fixture(scope="session")
def site(portexec_server_any_scope):
    return portexec_server_any_scope(["node", "server.js"], cwd=os.environ["APPS"])


@pytest.fixture(scope="session")
def browser(portexec_server_any_scope):
    driver = portexec_server_any_scope(["chromedriver", "--port={port}"])
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    with webdriver.Remote(driver.url, options=options) as browser:
        yield browser


def test_page(browser, site):
    browser.get(site.url)
    assert browser.find_element(By.TAG_NAME, "body").text.startswith("hello from")


def test_page_after_a_restart(browser, site):
    site.restart()
    browser.get(site.url)
    assert browser.find_element(By.TAG_NAME, "body").text == f"hello from {site.pid}"
