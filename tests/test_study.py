"""The study: its statistics against hand values, its rules, its commands and its rows."""
import shlex
import sys

import numpy as np
import pytest
import search
from conftest import ROOT, TINY, run
from genotypes import NB201_LARGEST, truth

sys.path.insert(0, str(ROOT / '.github' / 'study'))
import study  # noqa: E402

rng = np.random.Generator(np.random.Philox(1))


def exact(mean, deviation, n):
    """Return n values with exactly this mean and deviation."""
    z = rng.standard_normal(n)
    return mean + deviation * (z - z.mean()) / z.std(ddof=1)


def test_statistics_by_hand():
    a, b = [1.0, 2, 3, 4], [2.0, 4, 6]
    estimate, error, df = study.contrast((a, b))            # variances / n are 5/12 and 4/3
    assert estimate == pytest.approx(-1.5) and error ** 2 == pytest.approx(1.75)
    assert df == pytest.approx(1.75 ** 2 / ((5 / 12) ** 2 / 3 + (4 / 3) ** 2 / 2))
    assert study.contrast((a, b), (a, b))[1] == pytest.approx(error / 2 ** 0.5)
    assert study.interval(0, 1, 10) == pytest.approx((-2.228, 2.228), abs=1e-3)    # Student's
    assert study.p_different(-2.228, 1, 10) == pytest.approx(0.05, abs=1e-4)
    assert study.p_equivalent(0, 1, 10, margin=1.812) == pytest.approx(0.05, abs=1e-4)
    assert study.p_equivalent(3, 1, 10, margin=1.812) > 0.5
    holm = study.holm({'a': 0.01, 'b': 0.04, 'c': 0.03})
    assert holm == pytest.approx({'a': 0.03, 'b': 0.06, 'c': 0.06})
    assert study.heterogeneity([(0, 1, 9), (3, 1, 9)]) == pytest.approx(0.0339, abs=1e-4)


def test_outcomes_of_known_cells():
    alphas = np.tile([0.0, 0, 0, 0, 1e3], (6, 1))           # z is -.5, and 2 on the last
    weights = np.exp([-1.0, -1, -1, -1, 4])
    p = weights / weights.sum()
    expected = study.space()[1]
    for _ in range(6):
        expected = expected @ p
    assert study.soft_percentile(alphas) == pytest.approx(expected)
    assert study.place(NB201_LARGEST)[0] == pytest.approx(truth(NB201_LARGEST)['percentile'])
    assert study.place(NB201_LARGEST)[1:] == (study.place(NB201_LARGEST)[0], pytest.approx(
        np.nan, nan_ok=True))                               # no other cell has its operations
    like = ['|nor_conv_3x3~0|+|none~0|none~1|+|none~0|none~1|none~2|',
            '|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|']
    first, second = map(study.place, like)
    assert first[1] == second[1] and first[0] < second[0]   # only the second reaches the output
    # A class of six cells is too small for a placement; one of thirty is not.
    assert np.isnan(first[2])
    assert study.place(like[1].replace('none~2', 'skip_connect~2'))[2] > 50


@pytest.mark.parametrize('noise, deviation, expected', [
    (0.70, 0.03, 'not needed'), (0.69, 0.03, 'not needed'), (0.60, 0.03, 'needed'),
    (0.68, 0.015, 'not needed, but lower'),
    (0.70, 0.15, 'undecided'), (0.80, 0.03, 'undecided')])
def test_answers_of_scoring(noise, deviation, expected):
    rho = {kind: exact(0.70, deviation, 24) for kind in study.KINDS}
    given = {kind: exact(0.5, 0.03, 24) for kind in study.KINDS}
    rho['noise'] = exact(noise, deviation, 24)
    assert study.answers_b(rho, given)['noise'][0] == expected
    given['noise'] = exact(0.3, 0.03, 24)                   # the other primary outcome
    assert study.answers_b(rho, given)['noise'][0] == 'needed'


@pytest.mark.parametrize('noise, darts, real_placement, expected', [
    (75, 75, 60, 'not needed, within 4.5 of E2'), (72, 72, 60, 'not needed, within 7.0 of E2'),
    (71.5, 71.5, 60, 'not needed, within 7.0 of E2, but lower'), (60, 60, 60, 'needed'),
    (88, 88, 60, 'undecided'), (82, 62, 60, 'depends: darts worse'), (75, 75, 75, 'undecided'),
    (75, 75, 50, 'not shown that data teach where operations belong')])
def test_answers_of_searches_by_gradient(noise, darts, real_placement, expected):
    e2, placement = {}, {}
    for method in study.METHODS:
        for kind in study.KINDS:
            e2[method, kind], placement[method, kind] = exact(75, 14, 64), exact(57, 25, 64)
        placement[method, 'cifar10'] = exact(real_placement, 25, 64)
        e2[method, 'noise'] = exact(darts if method == 'darts' else noise, 14, 64)
    assert study.answers_a(e2, placement)['noise'][0] == expected
    for kind in study.KINDS:                                # as many cells without a placement
        placement['pcdarts', kind] = placement['pcdarts', kind][:kind == 'noise']
    assert study.answers_a(e2, placement)['noise'][0] == expected


def test_every_command_is_one_of_search_py_and_has_a_folder_of_its_own():
    commands = [shlex.split(text)[3:] for part in study.parts() for text in study.commands(part)]
    assert len({words[-1] for words in commands}) == len(commands) == 1630
    for words in {str(words[words.index('--data'):-1]): words for words in commands}.values():
        search.parse(words)                                 # one of each kind


@pytest.mark.parametrize('method', ['oneshot', 'darts'])
def test_a_finished_run_is_added_once(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, 'HERE', tmp_path)
    part, folder = ('B', 'B-noise') if method == 'oneshot' else ('A1', 'A1-noise')
    folder = tmp_path / f'study-{folder}-{method}-3'
    run(search.main, str(folder), *TINY, '--quick', '--method', method, '--seed', '3')
    study.add_runs([str(folder)])
    study.add_runs([str(folder)])
    name, measured, scores = ('scoring.csv', 'rho', study.SCORES) if method == 'oneshot' else \
        ('gradient.csv', 'e2', [None])
    rows = study.read_rows(name)
    assert [(row['seed'], row.get('score')) for row in rows] == [(3, score) for score in scores]
    assert rows[0]['percentile'] == pytest.approx(truth(rows[0]['genotype'])['percentile'])
    assert all(np.isfinite(row[measured]) for row in rows)
    assert not study.complete(rows, part)


def test_the_tables_and_the_figure(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['study.py'])
    study.main()
    out = ' '.join(capsys.readouterr().out.split())
    for text in ('largest network: percentile 98.9', 'best of 100 cells by parameters: 92.5',
                 '| cifar10 | 48 | 78.2 ± 26.6 | 76.6 ± 24.9 | 54.7 ± 27.6 | 75.1 ± 18.5 |',
                 '-10.4 [-16.7, -4.2]', 'random_labels: undecided; E2 from real -2.1 [-8.7, +4.6]',
                 'true error: -0.85', 'by parameters: rank correlation 0.786'):
        assert text in out
    study.draw_study(tmp_path / 'f.png')
    assert (tmp_path / 'f.png').read_bytes().startswith(b'\x89PNG')


def test_every_part_has_its_table_when_its_rows_are_there(capsys, monkeypatch, tmp_path):
    made, original = {'scoring.csv': [], 'gradient.csv': []}, study.read_rows
    for part in study.parts():
        name = 'gradient.csv' if part.startswith('A') else 'scoring.csv'
        for seed, arm, method, _ in study.runs(part):
            row = {'part': part, 'arm': arm, 'method': method, 'seed': seed, 'genotype': 'some',
                   'processor': 'old' if part == 'A1' and seed % 2 else 'new'}
            for key in ('rho', 'given_params', 'better_half', 'fit'):
                row[key] = rng.uniform(0.69, 0.71)
            for key in ('percentile', 'shuffled', 'placement', 'e2', 'best', 'ten_best', 'seconds'):
                row[key] = rng.uniform(60, 90)
            for score in study.SCORES if method == 'oneshot' else [method]:
                made[name].append({**row, 'score': score})
    monkeypatch.setattr(study, 'read_rows', lambda name: made.get(name) or original(name))
    study.print_study()
    out = capsys.readouterr().out
    assert 'not run' not in out and 'frozen weights, E2: ' in out
    assert out.count('E2 of A1 less that of A') == 4 and out.count('E2 of A2 less that of A2b') == 2
    assert out.count('E2 of A1 (new) less that of A') == 4 and '384 rows of old alone' in out
    for text in ('over 200 supernets of B and Bdose', 'E2 less that of the first study',
                 'generated_fresh less real data at their best', 'noise: not needed; rank'):
        assert text in out
    study.draw_study(tmp_path / 'f.svg')
    assert (tmp_path / 'f-dose.svg').read_text().count('half_random') == 1
