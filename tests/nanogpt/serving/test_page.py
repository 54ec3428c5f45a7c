"""The page in a real browser: typed, streamed, stopped; nothing from elsewhere, and fit for a phone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_zoo.nanogpt.serving.completions import Limits
from prepare.tokenizer import Characters
from tests.conftest import until
from tests.nanogpt.serving.conftest import Served, serving
from tests.nanogpt.test_generate import ALPHABET, reciter

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium: apt-get install chromium chromium-driver", allow_module_level=True)

LETTERS = "bcdefghijklmnopqrstuvwxyz\na"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    driver.set_window_size(1000, 800)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    tokenizer = Characters(ALPHABET)
    with serving(
        reciter(tokenizer.encode(ALPHABET).tolist(), 27), tokenizer, limits=Limits(slots=1, tokens=100_000_000)
    ) as one:
        yield one


class Page:
    """What a person sees and does."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def __getitem__(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self[name].get_property("textContent")

    def set(self, name: str, value: str) -> None:
        self[name].clear()
        self[name].send_keys(value)

    def done(self) -> bool:
        return self["text"].get_attribute("aria-busy") == "false" and len(self.text("text")) > 1

    def shoot(self, name: str) -> None:
        """Keep a picture, where somebody wants to look at them."""
        if folder := os.environ.get("ELASTIC_GPT_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.browser.save_screenshot(f"{folder}/{name}.png")


def test_what_is_typed_goes_on_by_the_keyboard_alone(browser: Any, served: Served) -> None:
    page = Page(browser, served.url)
    until(lambda: page.text("facts"))
    assert page.text("name") == "gpt"
    assert page.text("facts") == f"step 7 · {served.model.parameter_count():,} parameters · context of 16 tokens"
    assert browser.switch_to.active_element == page["prompt"]
    page.set("tokens", "30")
    page.set("temperature", "0")
    page["prompt"].send_keys("a", Keys.CONTROL, Keys.ENTER)
    until(page.done)
    assert page.text("text") == "a" + LETTERS[:27] + "bcd"
    assert page["speed"].get_property("value").startswith("30 tokens")
    assert not page["stop"].is_enabled()
    page.shoot("light")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("how", ["button", "key"])
def test_text_streams_and_stop_frees_the_server(how: str, browser: Any, served: Served) -> None:
    page = Page(browser, served.url)
    page.set("tokens", "100000000")
    page["prompt"].send_keys("a")
    page["send"].click()
    until(lambda: len(page.text("text")) > 20)  # while it is far from its end
    assert page["stop"].is_enabled()
    assert served.metric("running_generations") == 1
    page.shoot("streaming")
    if how == "button":
        page["stop"].click()
    else:
        page["prompt"].send_keys(Keys.ESCAPE)
    until(page.done)
    until(served.idle)
    stopped = page.text("text")
    assert stopped.startswith("abc")
    assert page["problem"].get_property("hidden")


def test_a_mistake_is_told_and_the_page_goes_on(browser: Any, served: Served) -> None:
    page = Page(browser, served.url)
    page["prompt"].send_keys("aß", Keys.CONTROL, Keys.ENTER)
    until(lambda: "'ß'" in page.text("problem"))
    page.shoot("mistake")
    page.set("prompt", "a")
    page.set("tokens", "2")
    page["send"].click()
    until(lambda: page.text("text") == "abc")
    assert page["problem"].get_property("hidden")


CUT = """
const whole = window.fetch;
window.fetch = async (...request) => {
  const answer = await whole(...request);
  if (!request[0].endsWith("completions")) return answer;
  const text = await answer.text();
  return new Response(text.slice(0, text.indexOf("data: [DONE]")), answer);
};
"""


def test_an_answer_whose_connection_ends_early_is_not_taken_for_a_whole_one(browser: Any, served: Served) -> None:
    page = Page(browser, served.url)
    until(lambda: page.text("facts"))
    browser.execute_script(CUT)
    page.set("tokens", "2")
    page.set("temperature", "0")
    page["prompt"].send_keys("a", Keys.CONTROL, Keys.ENTER)
    until(lambda: "ended before the answer did" in page.text("problem"))
    assert page.text("text") == "abc"
    browser.execute_script(
        "window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))"
    )  # as without a server
    page["send"].click()
    until(lambda: page.text("problem") == "The server does not answer (Failed to fetch).")


def test_a_phone_in_the_dark_shows_all_of_it_without_a_sideways_scroll(browser: Any, served: Served) -> None:
    device = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    try:
        page = Page(browser, served.url)
        page.set("tokens", "200")
        page["prompt"].send_keys("a", Keys.CONTROL, Keys.ENTER)
        until(page.done)
        page.shoot("phone-dark")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360
        red, green, blue = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert max(red, green, blue) < 64
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_server_that_wants_a_token_is_given_it_on_the_page(browser: Any) -> None:
    tokenizer = Characters(ALPHABET)
    with serving(reciter(tokenizer.encode(ALPHABET).tolist(), 27), tokenizer, token="secret") as guarded:
        page = Page(browser, guarded.url)
        until(lambda: page["token"].is_displayed())
        page["token"].send_keys("secret", Keys.TAB)
        until(lambda: page.text("facts"))
        page.set("tokens", "2")
        page.set("temperature", "0")
        page["prompt"].send_keys("a", Keys.CONTROL, Keys.ENTER)
        until(page.done)
        assert page.text("text") == "abc"
