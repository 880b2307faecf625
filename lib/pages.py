"""
HTML pages: one file each, that opens without a network and asks for nothing.

A page in this folder holds {{name}} in the places to fill. A name with a dot is another file of
this folder, such as a style or a script that several pages share. Other names are contents.
"""
import json
import os
import re

HERE = os.path.dirname(os.path.abspath(__file__))


def fill(page, **contents):
    """Return the text of a page of this folder, with every {{name}} filled in.

    contents: the text for each name without a dot. What is filled in is not searched again."""
    def content(match):
        name = match[1]
        return _read(name) if '.' in name else contents[name]
    return re.sub(r'\{\{([\w.]+)\}\}', content, _read(page))


def _read(name):
    with open(os.path.join(HERE, name), encoding='utf-8') as f:
        return f.read()


def as_json(value):
    """Return plain data as JSON for a page's <script type="application/json">.

    < is escaped, so that no text in the data can end the script element. Raises ValueError for
    numbers that are not finite."""
    return json.dumps(value, allow_nan=False).replace('<', '\\u003c')
