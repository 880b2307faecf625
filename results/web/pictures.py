"""
Pictures of a page, at 1200 and 375 pixels, light and dark, in results/web.

    python results/web/pictures.py results/web/main_job.html

Needs Chromium and playwright (requirements-dev.txt).
"""
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


def settled(page):
    """Wait until the page shows what there is to see."""
    page.evaluate('''(async () => {
        await gpt.ready;
        while (!state.seen || waiting.size || looking) await new Promise(requestAnimationFrame);
    })()''')


def shrink(path):
    """Save a picture with 128 colours: a third of the bytes."""
    Image.open(path).convert('RGB').quantize(128).save(path, optimize=True)


def photograph(browser, source, width, scheme):
    """Write the picture of a page that has a text, and a head that is off in the dark ones."""
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    page.goto(source.as_uri())
    settled(page)
    page.fill('#prompt', 'ROMEO:\nWhat light through yonder window br')
    settled(page)
    if scheme == 'dark':
        page.locator('#maps input').nth(2).click()
        settled(page)
    page.evaluate('document.activeElement.blur()')
    path = HERE / f'{width}-{scheme}.png'
    page.screenshot(path=path, full_page=True)
    shrink(path)
    if width > 1000 and scheme == 'light':   # README's: the upper part
        page.screenshot(path=HERE / 'picture.png', full_page=True,
                        clip=dict(x=0, y=0, width=width, height=1500))
        shrink(HERE / 'picture.png')
    page.close()


with sync_playwright() as p:
    browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
    for width in (1200, 375):
        for scheme in ('light', 'dark'):
            photograph(browser, Path(sys.argv[1]).resolve(), width, scheme)
    browser.close()
