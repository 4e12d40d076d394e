"""The READMEs: each command is one that its script understands, each snippet works."""
import importlib
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (DARTS, NOISE, ONE_STEP, RETRAIN, ROOT, TINY, one_line, printed, reports, run,
                      same_run, stop_in_every_step)

import evaluate
import search
from genotypes import DARTS_V2, random_cell, to_json

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
    value = {'m': 'darts', 'd': 'noise', 't': 'cifar10', 'k': 'k', 'e': '65', 'FLAGS': '',
             'a': 'runs/a'}
    words = re.sub(r'\$\{?(\w+)(%% \*\})?', lambda found: value.get(found[1], '0'), words)
    for folder in re.findall(r'runs/[\w.=-]+', words):
        Path(folder).mkdir(parents=True, exist_ok=True)
        found = random_cell('nb201', 0) if 'nb201' in words or 'laptop' in words else DARTS_V2
        Path(folder, 'genotype.json').write_text(to_json(found, data='noise', method='darts'))
    argv = shlex.split(words)
    if script in ('search', 'retrain'):
        importlib.import_module(script).parse(argv)
    elif script in ('generate_data', 'evaluate'):
        with pytest.raises(SystemExit):         # of the help; main returns 2 for another flag
            importlib.import_module(script).main([*argv, '--help'])


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


# The section "Change it": each snippet works when it is pasted into one file

def snippets():
    """{(file, 'below' or 'instead of', name): code} of the section."""
    section = (ROOT / 'README.md').read_text().split('## Change it')[1].split('\n## ')[0]
    found = {}
    for code in re.findall(r'```python\n(.*?)```', section, re.DOTALL):
        place, code = code.split('\n', 1)
        found[re.fullmatch(r'# (\w+\.py), (below|instead of) (\w+)', place).groups()] = code
    assert len(found) == 5                              # each has a test
    return found


def pasted(text, how, name, code):
    """The text of a script with code below, or instead of, the statement that sets `name`."""
    place = re.search(rf'^( *){name} = .*\n(\1[ )}}\]].*\n)*', text, re.MULTILINE)
    if how == 'below':
        return f'{text[:place.end()]}\n\n{code}{text[place.end():]}'
    return text[:place.start()] + textwrap.indent(code, place[1]) + text[place.end():]


@pytest.fixture
def scripts(monkeypatch):
    """scripts(file, how, name): the modules of a copy of the scripts with that snippet pasted."""
    def make(*place):
        folder = Path('copy').absolute()
        folder.mkdir()
        for path in ROOT.glob('*.py'):
            shutil.copy(path, folder)
            monkeypatch.delitem(sys.modules, path.stem)
        (folder / 'tests').symlink_to(ROOT / 'tests')
        file, how, name = place
        (folder / file).write_text(pasted((ROOT / file).read_text(), how, name, snippets()[place]))
        monkeypatch.syspath_prepend(folder)
        modules = {path.stem: importlib.import_module(path.stem) for path in folder.glob('*.py')}
        assert Path(modules['search'].__file__).parent == folder
        return modules
    return make


def test_a_method(scripts, capsys):
    modules = scripts('search.py', 'below', 'METHODS')
    run(modules['search'].main, 'found', *TINY, '--method', 'entropy', *ONE_STEP)
    assert reports(capsys, 'found')[0]['method'] == 'entropy'
    args = modules['search'].parse([*TINY, '--method', 'entropy'])
    method = modules['search'].METHODS['entropy'](args, 4, 'cifar', torch.device('cpu'))
    network = method.build()
    p = network.softmax(network.alphas['cell'])
    entropy = -0.1 * (p * p.log()).sum(1).mean()
    expected, = torch.autograd.grad(entropy, method.network.alphas['cell'])
    got, = torch.autograd.grad(method.alpha_loss(), method.network.alphas['cell'])
    assert torch.allclose(got, expected) and got.any()


def test_an_optimiser_of_the_alphas(scripts, capsys):
    modules = scripts('search.py', 'instead of', 'adam')
    run(modules['search'].main, 'found', *TINY)
    state = torch.load('found/checkpoint.pt', weights_only=True)['adam']['state'][0]
    assert 'square_avg' in state and reports(capsys, 'found')[0]['method'] == 'darts'
    assert stop_in_every_step(modules['search'].main, 'parts', *TINY) == 5
    same_run('parts', 'found')


def test_a_kind_of_data(scripts, capsys):
    modules = scripts('generate_data.py', 'below', 'KINDS')
    flags = ['--data', 'uniform', *NOISE[2:], *TINY[len(NOISE):], *ONE_STEP]
    run(modules['search'].main, 'found', *flags)
    assert reports(capsys, 'found')[0]['searched_on'] == 'uniform'
    assert modules['generate_data'].main(['--kind', 'uniform', '--out', 'set', *NOISE[2:]]) == 0
    assert abs(modules['generate_data'].read('set', {}).images.astype(float).std() - 74) < 1


def test_an_operation(scripts, capsys):
    run(search.main, 'before', *DARTS, *ONE_STEP, '--seed', '1')
    modules = scripts('operations.py', 'below', 'OPERATIONS')
    modules['search'].PDarts.MORE_CELLS = 0, 0, 0
    for method, steps in (('darts', '1'), ('gdas', '1'), ('pdarts', '3')):
        lines = run(modules['search'].main, method, *DARTS, '--method', method, '--frozen_epochs',
                    '0', '--epochs', steps, '--steps_per_epoch', '1')
        assert np.shape(lines[0]['alphas']['normal']) == (14, 9)
    cell = [('conv_7x1_1x7', state) for _ in range(4) for state in (0, 1)]
    Path('own.json').write_text(to_json(DARTS_V2._replace(normal=cell, reduce=cell)))
    run(modules['retrain'].main, 'found', '--arch', 'own.json', *RETRAIN[2:])
    row, = reports(capsys, 'found')
    assert row['genotype']['normal'][0] == ['conv_7x1_1x7', 0] and row['params'] > 0
    # Runs of other scripts have a line of their own; without the operation its run is an error.
    assert printed(capsys, 'before', 'darts', 'found').out.count('\n') == 4
    one_line(capsys, evaluate.main(['found', '--gpu', '-1']), 'conv_7x1_1x7')


def test_a_metric(scripts, capsys):
    modules = scripts('evaluate.py', 'below', 'METRICS')
    lines = run(modules['retrain'].main, 'found', *RETRAIN)
    run(modules['retrain'].main, 'other', *RETRAIN, '--seed', '1')
    assert reports(capsys, 'found')[0]['fit_calibration'] == lines[-1]['fit_calibration']
    out = printed(capsys, 'found', 'other', '--csv', 't.csv').out
    assert 'training calibration error %' in out
    assert 'fit_calibration' in Path('t.csv').read_text()
    # Two answers of confidence .9, one of them right; and one of .6 that is wrong.
    scores = torch.tensor([[.9, .1], [.9, .1], [.4, .6]]).log()
    error = modules['evaluate'].calibration_error(scores, torch.tensor([0, 1, 0]), ['a', 'b'])
    assert error == pytest.approx(100 * (abs(1.8 - 1) + 0.6) / 3, rel=1e-5)
