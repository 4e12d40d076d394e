"""Searches that score cells: against plain networks and formulas, and from end to end."""
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import textbook
import torch
from conftest import (ONESHOT, SIZES, UNTRAINED, batch, close, make_set, read_rows, reports, run,
                      searching, with_textbook)
from scipy.stats import kendalltau, rankdata, spearmanr
from torch.nn import functional as F

import evaluate
import generate_data
import search
from generate_data import Batches
from genotypes import (distinct_cells, expression, from_string, random_string,
                       to_string)

CELLS = textbook.NB201_NAMES


def scoring(name):
    """(method, the textbook's supernet with its weights) in nb201."""
    method, network, book, _ = with_textbook('--space', 'nb201', '--method', name)
    network.train()
    return method, book


def network_of(supernet, arch):
    """The textbook's network of a cell, with the weights of its supernet."""
    names = from_string(arch)
    network = textbook.NB201Network(4, 4, 1, names)
    for part in ('stem', 'last', 'classifier'):
        getattr(network, part).load_state_dict(getattr(supernet, part).state_dict())
    for cell, whole in zip(network.cells, supernet.cells):
        if isinstance(cell, textbook.NB201Reduction):
            cell.load_state_dict(whole.state_dict())
            continue
        for edge, candidates, name in zip(cell.edges, whole.edges, names):
            chosen = candidates[CELLS.index(name)].state_dict()
            edge[0].load_state_dict(chosen, strict=False)
    return network


def test_scores_of_200_cells_are_those_of_networks_built_cell_by_cell(float64):
    method, book = scoring('oneshot')
    method.halves = [batch(), batch()]
    method.products = {}
    cells = distinct_cells()[::32][:200]
    assert len(cells) == 200
    for arch in cells:
        method.take(arch)
        scores, network = method.measure(arch), network_of(book, arch)
        for half, (x, y) in zip(('train', 'valid'), method.halves):
            logits = network(x)
            loss = F.cross_entropy(logits, y).item()
            assert scores[f'{half}_loss'] == pytest.approx(loss, abs=1e-10)
            right = (logits.argmax(1) == y).double().mean().item()
            assert scores[f'{half}_accuracy'] == pytest.approx(right)


def test_angle_is_that_of_the_weights_on_the_paths_before_and_after(float64):
    torch.manual_seed(0)                        # --seed
    method, before = scoring('oneshot')
    with torch.no_grad():
        for p in method.network.weight_parameters():
            p.add_(0.1 * torch.randn_like(p))
    after = textbook.NB201Network(4, 4, 1)
    textbook.copy_weights(method.network, after)
    method.batches, method.fixed_batch = [0, 0], lambda *_: batch()
    method.prepare()
    # Node 2 leads nowhere: on paths are edges 0 and 4, and edge 3 has no weights.
    names = ['nor_conv_3x3', 'none', 'nor_conv_1x1', 'skip_connect', 'nor_conv_3x3', 'none']
    vectors = []
    for book in (before, after):
        cells = [cell for cell in book.cells if isinstance(cell, textbook.NB201Cell)]
        vectors.append(torch.cat([cell.edges[e][3][1].weight.flatten()
                                  for cell in cells for e in (0, 4)]))
    angle = torch.acos(torch.cosine_similarity(*vectors, dim=0)).item()
    for arch, wanted in ((names, angle), (['skip_connect'] * 6, 0)):
        method.take(to_string(arch))
        assert method.measure(to_string(arch))['angle'] == pytest.approx(wanted, abs=1e-10)


def naswot(network, x, y):
    """log |det| of the kernel of how many ReLUs agree, from Hamming's distance."""
    codes = []
    relus = [module for module in network.modules() if isinstance(module, torch.nn.ReLU)]
    for module in (*relus, network.last):               # the last is before a functional ReLU
        module.register_forward_hook(lambda module, x, out: codes.append((out > 0).flatten(1)))
    network(x)
    code = torch.cat(codes, 1)
    distance = (code[:, None] != code[None]).sum(2)
    return torch.linalg.slogdet((code.shape[1] - distance).double())[1].item()


def snip(network, x, y):
    F.cross_entropy(network(x), y).backward()
    return sum((p * p.grad).abs().sum().item() for p in network.parameters()
               if p.dim() > 1 and p.grad is not None)


def synflow(network, x, y):
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.Identity())
    for p in network.parameters():
        p.data.abs_()
    network(torch.ones_like(x[:1])).sum().backward()
    return sum((p * p.grad).sum().item() for p in network.parameters()
               if p.dim() > 1 and p.grad is not None)


@pytest.mark.parametrize('formula', [naswot, snip, synflow])
def test_scores_of_untrained_cells_are_those_of_plain_formulas(float64, formula):
    name, pair = formula.__name__, batch()
    method, book = scoring(name)
    method.batches = [SimpleNamespace(data=SimpleNamespace(image_size=8))]
    method.fixed_batch = lambda *_: pair
    method.prepare()
    for seed in range(12):
        arch = random_string(seed)
        method.take(arch)
        got, wanted = method.measure(arch)[name], formula(network_of(book, arch), *pair)
        assert got == pytest.approx(wanted, rel=1e-9) or got == wanted == -math.inf


def test_draws_are_uniform_over_operations():
    method, network = searching('--method', 'oneshot', '--space', 'nb201')
    counts = Counter()
    for _ in range(400):
        with method.weight_training(None):
            counts.update(method.cell['cell'])
    assert set(counts) == set(range(5)) and max(counts.values()) < 1.3 * min(counts.values())


def test_equal_cells_of_nb201_are_scored_once():
    cells = distinct_cells()
    assert len(cells) == len({expression(cell)[0] for cell in cells}) == 6466
    assert expression(to_string(['skip_connect'] * 6))[0] == 'x+x+x+x'


@pytest.mark.parametrize('name', ['oneshot', 'naswot', 'snip', 'synflow'])
@pytest.mark.parametrize('space', ['darts', 'nb201'])
def test_every_scoring_method_takes_the_best_of_its_scores(name, space, capsys):
    some = ['--max_steps', '2', *SIZES] if name == 'oneshot' else ['--repeats', '2']
    flags = [*UNTRAINED, '--space', space, '--layers', '3', *some]
    lines = run(search.main, 'run', *flags, '--method', name, '--candidates', '6')
    assert lines[-1]['cells'] == 6
    rows = read_rows('run/scores.csv')
    found = json.loads(Path('run/genotype.json').read_text())
    by = 'train_loss' if name == 'oneshot' else name            # noise: labels are random
    assert found['score'] == by and len(rows) == 6 and found['arch_data'] is None
    best = (min if by == 'train_loss' else max)(rows, key=lambda row: float(row[by]))
    if space == 'nb201':
        assert best['genotype'] == found['arch_str']
    else:
        assert json.loads(best['genotype'])['normal'] == found['normal']
    assert all(int(row['cell_params']) >= 0 for row in rows)
    row, = reports(capsys, 'run')
    assert row['score'] == by and ('spearman' in row) == (space == 'nb201')
    evaluate.main(['run', '--plot', 'scores.svg', '--gpu', '-1'])
    assert ('true CIFAR-10' if space == 'nb201' else 'parameters') in \
        Path('scores.svg').read_text()


def test_score_and_repeats_have_an_effect_and_rank_correlations_are_those_of_scipy(capsys):
    run(search.main, 'run', *ONESHOT)
    run(search.main, 'angle', *ONESHOT, '--score', 'angle')
    assert json.loads(Path('angle/genotype.json').read_text())['score'] == 'angle'
    assert Path('angle/scores.csv').read_text() == Path('run/scores.csv').read_text()
    for repeats in '12':
        run(search.main, repeats, *UNTRAINED, '--method', 'naswot', '--repeats', repeats)
    assert Path('1/scores.csv').read_text() != Path('2/scores.csv').read_text()
    scores, by = evaluate.read_cell_scores('run')
    row, = reports(capsys, 'run')
    assert by == 'train_loss' and row['cells'] == 12
    value, truth, params = (rankdata(scores[name]) for name in (by, 'cifar10', 'cell_params'))
    assert row['spearman'] == pytest.approx(spearmanr(value, truth)[0])
    assert row['kendall'] == pytest.approx(kendalltau(value, truth)[0])
    left = [v - np.polyval(np.polyfit(params, v, 1), params) for v in (value, truth)]
    assert row['spearman_given_params'] == pytest.approx(np.corrcoef(*left)[0, 1])
    best = np.argsort(-scores[by], kind='stable')[:10]
    assert row['best_of_top_10'] == scores['cifar10'][best].max()


@pytest.mark.parametrize('kind', [
    ['noise'], ['generated'], ['generated', '--generator', 'spectrum'],
    ['generated', '--generator', 'deadleaves'], ['generated', '--multilabel']])
def test_fresh_draws_every_image_anew_for_its_label(kind):
    make_set('set', *kind[1:], '--image_size', '16', kind=kind[0])
    data = generate_data.read('set', {'fresh': 2})
    batches = Batches(data, range(40), 8, torch.device('cpu'), shuffle=False, workers=0)
    seen = []
    for epoch in range(5):
        x, y = (torch.cat(part) for part in zip(*batches.epoch(epoch)))
        seen.append(x)
        assert torch.equal(y, batches.labels)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    flat = torch.cat([x.flatten(1) for x in (seen[0], seen[2], seen[4])])
    assert len(flat.unique(dim=0)) == 120       # nothing is seen twice
    stored = (torch.from_numpy(np.array(data.images)).float() - batches.mean) * batches.scale
    close(seen[0], stored.permute(0, 3, 1, 2), 1e-6)
    assert np.array_equal(data.draw([5, 31, 8], 1)[1:2], data.draw([31], 1))
    again = Batches(data, range(40), 8, torch.device('cpu'), shuffle=False, workers=2)
    assert torch.equal(torch.cat([x for x, _ in again.epoch(4, 3)]), seen[4][24:])
    if kind == ['noise']:                       # an image is that of its place in the stream
        stream = generate_data.noise_images(0, 0, 120, 16)
        assert np.array_equal(data.draw([3, 17], 2), stream[[83, 97]])


def test_the_slightest_alpha_decides_and_equal_ones_are_broken_by_seed():
    method, network = searching('--space', 'nb201')
    with torch.no_grad():
        network.alphas['cell'].zero_()
    found = Counter(name for seed in range(50) for name in from_string(network.genotype(seed)))
    assert min(found[name] for name in CELLS) > 30              # of 60 expected
    assert network.genotype(3) == network.genotype(3)
    with torch.no_grad():
        network.alphas['cell'][:, 3] = 1e-9                     # float32's softmax is flat
    assert network.genotype() == to_string(['nor_conv_3x3'] * 6)
