"""Every command in the READMEs is one that the scripts understand; those marked quick run."""
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import evaluate
import generate_data
import retrain
import search
from genotypes import DARTS_V2, random_string, to_json

PAGES = 'README.md', 'tests/README.md', '.github/study/README.md'


def commands():
    """[(page, script, arguments)] of the indented and fenced lines of shell in the READMEs."""
    found = []
    for page in PAGES:
        for line in re.findall(r'^    .*$', (ROOT / page).read_text(), re.M):
            for script, words in re.findall(r'(\w+)\.py ([^;|&>\'#]+)', line):
                found.append((page, script, words.strip()))
    return found


def parsed(script, words):
    """Parse a command as its script would, before it touches any data."""
    value = {'m': 'darts', 'd': 'noise', 't': 'cifar10', 'k': 'k', 'FLAGS': ''}
    words = re.sub(r'\$\{?(\w+)(%% \*\})?', lambda found: value.get(found[1], '0'), words)
    for run in re.findall(r'runs/[\w.=-]+', words):
        Path(run).mkdir(parents=True, exist_ok=True)
        found = random_string(0) if 'nb201' in words or 'laptop' in words else DARTS_V2
        Path(run, 'genotype.json').write_text(to_json(found, data='noise', method='darts'))
    argv = shlex.split(words)
    if script in ('search', 'retrain'):
        {'search': search, 'retrain': retrain}[script].parse(argv)
    elif script == 'generate_data':
        flags = {word[2:] for word in argv[1:] if word.startswith('--')}
        assert flags <= {*generate_data.DATA, 'kind', 'out', 'force', 'seed', 'gpu',
                         'generator_steps'}
    elif script == 'evaluate':
        tables = {'runs': evaluate.RUNS, 'cost': evaluate.COST}
        generate_data.parse_flags(evaluate.__doc__, tables, argv)


@pytest.mark.parametrize('page', PAGES)
def test_every_command_is_understood_by_its_script(page, capsys):
    known = [words for words in commands() if words[0] == page]
    assert known
    for _, script, words in known:
        parsed(script, words)


def test_the_first_command_of_the_readme_runs():
    first = next(words for page, script, words in commands() if script == 'search')
    assert '--quick' in first
    assert search.main([*shlex.split(first), '--steps_per_epoch', '1', '--num_images', '200']) == 0
    assert list(Path('runs').glob('*/genotype.json'))


def test_readme_is_short():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 320 and len(text.encode()) <= 20_000
    prose = re.sub(r'```.*?```|^    .*$|^\|.*$|<img[^>]*>|!\[.*?\)', '', text, flags=re.S | re.M)
    prose = re.sub(r'`[^`]*`|\([^)]*\)', 'x', prose)
    long = [s for s in re.split(r'(?<=[.?:!])\s+|\n\n', prose) if len(s.split()) > 30]
    assert not long, long
