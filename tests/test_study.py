"""The first study: its statistics against hand values, its rules, its rows, table and figure."""
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DARTS, ROOT, TINY, log, read_rows, run
from genotypes import random_string

sys.path.insert(0, str(ROOT / '.github' / 'study'))
import search  # noqa: E402
import study  # noqa: E402

CELLS = [random_string(seed) for seed in range(16)]


def arms(method='darts', **given):
    """Return made-up arms: by name (mean, deviation, n)."""
    made, rng = {}, np.random.Generator(np.random.Philox(1))
    for arm, (mean, deviation, n) in given.items():
        z = rng.standard_normal(n)
        made[method, arm.replace('_', ' ')] = [
            {'percentile': value, 'genotype': CELLS[k], 'collapsed': False}
            for k, value in enumerate(mean + deviation * (z - z.mean()) / z.std(ddof=1))]
    return made


def test_statistics_by_hand():
    a, b = [1.0, 2, 3, 4], [2.0, 4, 6]
    estimate, error, df = study.welch((1, a), (-1, b))      # variances / n are 5/12 and 4/3
    assert estimate == pytest.approx(-1.5) and error ** 2 == pytest.approx(1.75)
    assert df == pytest.approx(1.75 ** 2 / ((5 / 12) ** 2 / 3 + (4 / 3) ** 2 / 2))
    assert study.p_greater(2.228, 1, 10) == pytest.approx(0.025, abs=1e-4)     # Student's table
    assert study.p_different(-2.228, 1, 10) == pytest.approx(0.05, abs=1e-4)
    assert study.p_equivalent(0, 1, 10, margin=1.812) == pytest.approx(0.05, abs=1e-4)
    both = study.welch((0.5, a), (-0.5, b), (0.5, a), (-0.5, b))       # the mean of two
    assert both[1] == pytest.approx(error / 2 ** 0.5)
    assert study.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    chances = study.power(10 / 8 ** 0.5, 30, tests=6)       # those of the protocol
    assert chances == pytest.approx((0.996, 0.23), abs=0.005)
    x, y, z = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5], [1, 3, 2, 5, 4]      # pairs have .8, .8 and .3
    assert study.spearman(x, y)[0] == pytest.approx(0.8)
    assert study.partial_spearman(x, y, z) == pytest.approx(
        (0.8 - 0.8 * 0.3) / ((1 - 0.8 ** 2) * (1 - 0.3 ** 2)) ** 0.5)


@pytest.mark.parametrize('given, expected', [
    (dict(cifar10=(90, 5, 16), noise=(90, 5, 16), no_data=(50, 5, 16)), 'equivalent'),
    (dict(cifar10=(95, 1, 16), noise=(92, 1, 16), no_data=(50, 5, 16)), 'equivalent'),
    (dict(cifar10=(90, 25, 16), noise=(87, 25, 16), no_data=(50, 25, 16)), 'undecided'),
    (dict(cifar10=(70, 15, 16), noise=(50, 15, 16), no_data=(30, 15, 16)), 'worse'),
    (dict(cifar10=(70, 15, 16), noise=(90, 15, 16), no_data=(30, 15, 16)), 'better'),
    (dict(cifar10=(5, 3, 16), noise=(30, 3, 16), no_data=(50, 5, 16)), 'uninformative'),
    (dict(cifar10=(95, 2, 16), noise=(95, 2, 16), no_data=(95, 2, 16)), 'uninformative'),
    (dict(cifar10=(95, 2, 16), noise=(95, 2, 16)), 'undecided'),               # no control
    (dict(cifar10=(90, 1, 3), noise=(20, 1, 3), no_data=(50, 5, 16)), 'undecided')])
def test_verdicts(given, expected):
    lines = study.compare(arms(**given))
    assert lines['darts', 'noise']['verdict'] == expected
    assert 'verdict' not in lines['darts', 'cifar10']           # nor any control


def test_finished_searches_are_added_once(capsys):
    for name in ('0', '1', '2', 'other'):
        run(search.main, name, *TINY, '--max_steps', '1', '--arch_data', 'train', '--seed',
            name.replace('other', '0'))
    run(search.main, 'darts', *DARTS, '--max_steps', '1')
    Path('2/genotype.json').unlink()
    args = Path('other/args.json')
    args.write_text(args.read_text().replace('"command": "', '"command": "other '))
    study.add_runs('s.csv', ['0', '2'])
    Path('s.csv').write_text(Path('s.csv').read_text().rstrip('\n'))
    study.add_runs('s.csv', ['0', '1'])
    assert '2 is not finished' in capsys.readouterr().out
    for wrong in ('darts', 'other'):
        with pytest.raises(SystemExit, match='Leave'):
            study.add_runs('s.csv', ['1', wrong])
    rows, line = read_rows('s.csv'), log('0')[-1]
    assert [row['seed'] for row in rows] == ['0', '1'] and list(rows[0]) == study.COLUMNS
    assert rows[0]['entropy'] == f'{line["entropy_cell"]:.4g}' and rows[0]['steps'] == '1'
    assert rows[0]['genotype'] == line['genotype']
    assert len(study.read_rows('s.csv')['darts', 'noise, alphas on train']) == 2


def test_the_studys_tables_and_figure_and_those_of_the_fit(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['study.py', '--plot', 'f.png'])
    study.main()
    out = capsys.readouterr().out
    assert '|darts|noise|16|74.6±24.8|+1.2[-17.7,+20.6]|+24.6[+12.2,+35.6]|undecided|12%|2|16|' \
        in out.replace(' ', '')
    for text in ('random_labels: undecided', 'generated: undecided', 'noise: undecided',
                 'darts, pcdarts, betadarts -1.3 [-11.8, +9.2]', '656 searches, 13.8 hours',
                 'betadarts: 9% of the variance', '1440 pairs, genotypes agree in 0.35'):
        assert text in out
    assert Path('f.png').read_bytes().startswith(b'\x89PNG')
    study.print_fit(ROOT / '.github' / 'study' / 'fit.jsonl')
    out = capsys.readouterr().out.replace(' ', '')
    assert '|85.58±26.07[' in out and 'byNAS-Bench-201|63|-0.85[-0.91,-0.74]|-|' in out
