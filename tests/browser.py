"""The report in a real browser: what its tests ask and do there."""

import json
import re
from pathlib import Path


def page_data(page: Path) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text[1])


def found(browser) -> tuple[int, int]:
    """Words that the filter leaves, and how many of them are wrong."""
    text = browser.execute_script("return document.getElementById('found').textContent")
    counts = [int(each.replace(",", "")) for each in re.findall(r"[\d,]*\d", text)]
    return counts[0], counts[2]


def fill(browser, **values: object) -> None:
    """Give fields of the filter values, as typing does."""
    for name, value in values.items():
        browser.execute_script(
            "const field = document.querySelector(`#filter [name=${arguments[0]}]`);"
            "if (field.type === 'checkbox') field.checked = arguments[1]; else field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}));",
            name,
            value,
        )


def missing_images(browser) -> int:
    """Backgrounds of shown tiles that do not load."""
    return browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "const urls = new Set([...document.querySelectorAll('.tile, .tile > i')].map("
        "  (each) => each.style.backgroundImage.slice(5, -2)));"
        "Promise.all([...urls].map((url) => new Promise((resolve) => {"
        "  const image = new Image(); image.onload = () => resolve(0); image.onerror = () => resolve(1);"
        "  image.src = url;}))).then((bad) => done(urls.size ? bad.reduce((a, b) => a + b, 0) : -1));"
    )


def show(browser, page: Path, *, width: int, height: int = 844) -> None:
    """Open a page in a window, below 640 pixels of width that of a telephone."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640},
    )
    browser.get(page.resolve().as_uri())


def overflow(browser, width: int) -> int:
    """Pixels by which the page that is shown is wider than its window."""
    return max(browser.execute_script("return document.documentElement.scrollWidth") - width, 0)
