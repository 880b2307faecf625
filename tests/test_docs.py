"""docs/tour.md shows what docs/tour.py prints. pytest tests/test_docs.py"""
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from lib.prepare import write_dataset
from lib.tokenizers import CharTokenizer


def test_the_tour(folder, shakespeare):
    """Every block of the page, word by word; numbers within what another processor's rounding may change."""
    text = shakespeare.read_text(encoding='utf-8')
    tokenizer = CharTokenizer(text)
    write_dataset('data/shakespeare_char', {'train': [(tokenizer.encode(text[:2000]), 2000)]}, tokenizer,
                  dict(name='head', url=None, sha256='', stand_in=False))
    done = subprocess.run([sys.executable, '-W', 'error', str(ROOT / 'docs/tour.py')], capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'PYTHONIOENCODING': 'utf-8'})
    assert done.returncode == 0 and done.stderr == '', done.stderr
    printed = done.stdout.strip().split('\n\n')
    shown = re.findall(r'```text\n(.*?)\n```', (ROOT / 'docs/tour.md').read_text(encoding='utf-8'), re.S)
    assert len(shown) == len(printed) == 8
    number = re.compile(r'-?\d+\.\d+')
    for here, there in zip(shown, printed):
        assert re.sub(r' +', ' ', number.sub('0', here)) == re.sub(r' +', ' ', number.sub('0', there))
        assert list(map(float, number.findall(here))) == pytest.approx(list(map(float, number.findall(there))), abs=2e-3)
