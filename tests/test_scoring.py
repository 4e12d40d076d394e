"""Searches that score cells: against plain networks and formulas, and from end to end."""
import csv
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import textbook
import torch
from conftest import (DARTS, TINY, batch, close, log, one_line, reports, run, same_run, searching,
                      stop_in_every_step)
from scipy.stats import kendalltau, rankdata, spearmanr

import evaluate
import generate_data
import search
from generate_data import Batches
from genotypes import (distinct_cells, expression, from_string, nas_bench_201, random_string,
                       to_string)

CELLS = 'none', 'skip_connect', 'nor_conv_1x1', 'nor_conv_3x3', 'avg_pool_3x3'


def scoring(name, *flags):
    """(method, the textbook's supernet with its weights) in nb201."""
    method, network = searching('--space', 'nb201', '--method', name, *flags)
    network.train()
    book = textbook.NB201Network(4, 4, 1)
    textbook.copy_weights(network, book)
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


def weights_of(network):
    return [p for p in network.parameters() if p.dim() > 1]


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
            loss = torch.nn.functional.cross_entropy(logits, y).item()
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
    names = ['nor_conv_3x3', 'none', 'nor_conv_1x1', 'skip_connect', 'nor_conv_3x3', 'none']
    assert set(expression(to_string(names))[1]) == {(1, 0), (3, 0), (3, 1)}
    on_paths = (0, 'nor_conv_3x3'), (4, 'nor_conv_3x3')         # node 2 leads nowhere
    vectors = []
    for book in (before, after):
        cells = [cell for cell in book.cells if isinstance(cell, textbook.NB201Cell)]
        convs = [cell.edges[e][CELLS.index(name)][1].weight.flatten()
                 for cell in cells for e, name in on_paths]
        vectors.append(torch.cat(convs))
    method.take(to_string(names))
    angle = torch.acos(torch.cosine_similarity(*vectors, dim=0)).item()
    assert method.measure(to_string(names))['angle'] == pytest.approx(angle, abs=1e-10)
    method.take(to_string(['skip_connect'] * 6))
    assert method.measure(to_string(['skip_connect'] * 6))['angle'] == 0


SEEDS = range(12)


def test_naswot_is_log_det_of_the_kernel_of_relu_patterns(float64):
    method, book = scoring('naswot')
    method.x = batch()[0]
    method.fixed_batch, method.batches = lambda *_: (method.x, None), [None]
    method.prepare()
    codes = []

    def keep(module, given, out):
        codes.append((out > 0).flatten(1))
    for seed in SEEDS:
        arch = random_string(seed)
        network = network_of(book, arch)
        for module in network.modules():
            if isinstance(module, torch.nn.ReLU):
                module.register_forward_hook(keep)
        network.last.register_forward_hook(keep)        # before a functional ReLU
        codes.clear()
        network(method.x)
        code = torch.cat(codes, 1)
        distance = (code[:, None] != code[None]).sum(2)         # Hamming's
        expected = torch.linalg.slogdet((code.shape[1] - distance).double())[1]
        method.take(arch)
        got = method.measure(arch)['naswot']
        assert got == pytest.approx(expected.item(), abs=1e-8) or got == expected == -math.inf


def test_snip_sums_weight_times_gradient(float64):
    method, book = scoring('snip')
    pair = batch()
    method.fixed_batch, method.batches = lambda *_: pair, [None]
    method.prepare()
    for seed in SEEDS:
        network = network_of(book, random_string(seed))
        textbook.loss(network, pair).backward()
        expected = sum((p * p.grad).abs().sum().item() for p in weights_of(network)
                       if p.grad is not None)
        method.take(random_string(seed))
        assert method.measure(random_string(seed))['snip'] == pytest.approx(expected, rel=1e-10)


def test_synflow_is_that_of_a_linear_network_of_the_weights_sizes(float64):
    method, book = scoring('synflow')
    data = generate_data.Data('x', 'noise', None, None, [], [], [], 8, {})
    method.fixed_batch, method.batches = lambda *_: None, [type('', (), {'data': data})]
    method.prepare()
    for seed in SEEDS:
        network = network_of(book, random_string(seed))
        for module in network.modules():
            for name, child in module.named_children():
                if isinstance(child, torch.nn.BatchNorm2d):
                    setattr(module, name, torch.nn.Identity())
        for p in network.parameters():
            p.data.abs_()
        total = network(torch.ones(1, 3, 8, 8)).sum()
        total.backward()
        expected = sum((p * p.grad).sum().item() for p in weights_of(network)
                       if p.grad is not None)
        method.take(random_string(seed))
        got = method.measure(random_string(seed))['synflow']
        assert got == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize('space', ['darts', 'nb201'])
def test_a_step_computes_only_the_cell_that_is_drawn(space):
    method, network = searching('--method', 'oneshot', '--space', space)
    calls, taken, take = [], [], method.take
    method.take = lambda genotype: (taken.append(genotype), take(genotype))
    for key, module in network.named_modules():
        if '.blocks.' in key and key.count('.') == 6:
            module.register_forward_hook(lambda module, *_: calls.append(module))
    sgd, _ = search.optimizers(network, method.args)
    for _ in range(3):
        calls.clear()
        search.weight_step(method, batch(), sgd)
        if space == 'nb201':
            convs = sum('conv' in name for name in from_string(taken[-1]))
            assert len(calls) == len(set(calls)) == 3 * convs
        else:                                   # 8 edges in each of the three cells
            assert 3 < len(calls) == len(set(calls)) <= 3 * 8
            for cell in ('normal', 'reduce'):
                columns = [k for k in method.cell[cell] if k]
                assert len(columns) == 8
    assert len(set(taken)) == 3


def test_draws_are_uniform_over_operations():
    method, network = searching('--method', 'oneshot', '--space', 'nb201')
    counts = Counter()
    for _ in range(400):
        with method.weight_training(None):
            counts.update(method.cell['cell'])
    assert set(counts) == set(range(5)) and max(counts.values()) < 1.3 * min(counts.values())


def test_equal_cells_of_nb201_are_scored_once():
    cells = distinct_cells()
    assert len(cells) == len(set(cells)) == 6466
    assert expression(to_string(['skip_connect'] * 6))[0] == 'x+x+x+x'
    for a, b in zip(cells[:40], cells[1:]):
        assert expression(a)[0] != expression(b)[0]


ONESHOT = [*TINY, '--method', 'oneshot', '--candidates', '12']


def test_a_scoring_run_that_is_stopped_in_every_step_ends_as_one_that_is_not():
    run(search.main, 'whole', *ONESHOT)
    assert stop_in_every_step(search.main, 'broken', *ONESHOT) > 2
    same_run('whole', 'broken')
    assert Path('whole/scores.csv').read_text() == Path('broken/scores.csv').read_text()


@pytest.mark.parametrize('name', ['oneshot', 'naswot', 'snip', 'synflow'])
@pytest.mark.parametrize('sizes', [DARTS, TINY])
def test_every_scoring_method_takes_the_best_of_its_scores(name, sizes, capsys):
    some = ['--max_steps', '2'] if name == 'oneshot' else ['--repeats', '2']
    if name != 'oneshot':                       # nothing of the schedule means anything
        sizes = [word for word in sizes if word not in ('--epochs', '--steps_per_epoch', '2')]
    lines = run(search.main, 'run', *sizes, '--method', name, *some, '--candidates', '6')
    assert lines[-1]['cells'] == 6
    rows = list(csv.DictReader(Path('run/scores.csv').read_text().splitlines()))
    found = json.loads(Path('run/genotype.json').read_text())
    by = 'train_loss' if name == 'oneshot' else name            # noise: labels are random
    assert found['score'] == by and len(rows) == 6 and found['arch_data'] is None
    best = (min if by == 'train_loss' else max)(rows, key=lambda row: float(row[by]))
    if sizes[-1] == 'nb201':
        assert best['genotype'] == found['arch_str']
    else:
        assert json.loads(best['genotype'])['normal'] == found['normal']
    assert all(int(row['cell_params']) >= 0 for row in rows)
    row, = reports(capsys, 'run')
    assert row['score'] == by and ('spearman' in row) == (sizes[-1] == 'nb201')
    evaluate.main(['run', '--plot', 'scores.svg', '--gpu', '-1'])
    assert ('true CIFAR-10' if sizes[-1] == 'nb201' else 'parameters') in \
        Path('scores.svg').read_text()


def test_score_and_repeats_and_candidates_have_an_effect():
    run(search.main, 'a', *ONESHOT)
    run(search.main, 'b', *ONESHOT, '--score', 'angle')
    assert json.loads(Path('b/genotype.json').read_text())['score'] == 'angle'
    assert Path('a/scores.csv').read_text() == Path('b/scores.csv').read_text()
    flags = ['--data', 'noise', '--num_images', '64', '--image_size', '8', '--space', 'nb201',
             '--method', 'naswot', '--init_channels', '4', '--cells_per_stage', '1',
             '--batch_size', '8', '--candidates', '3', '--gpu', '-1']
    run(search.main, 'one', *flags, '--repeats', '1')
    run(search.main, 'two', *flags, '--repeats', '2')
    assert Path('one/scores.csv').read_text() != Path('two/scores.csv').read_text()
    assert len(Path('two/scores.csv').read_text().splitlines()) == 4


@pytest.mark.parametrize('flags, needle', [
    (['--method', 'oneshot', '--arch_data', 'train'], '--arch_data'),
    (['--method', 'oneshot', '--repeats', '2'], '--repeats'),
    (['--method', 'naswot', '--score', 'angle'], '--score'),
    (['--method', 'synflow', '--epochs', '3'], '--epochs'),
    (['--method', 'darts', '--candidates', '5'], '--candidates'),
    (['--data', 'cifar10', '--fresh'], '--fresh'),
    (['--data', 'random_labels', '--fresh', '2'], '--fresh')])
def test_flags_that_mean_nothing_for_a_method_are_refused(flags, needle, capsys):
    one_line(capsys, search.main([*flags, '--gpu', '-1']), needle)


def test_rank_correlations_are_those_of_scipy(capsys):
    run(search.main, 'run', *ONESHOT)
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


# --fresh

def folder_of(name, *flags):
    assert generate_data.main(['--kind', *flags, '--num_images', '40', '--num_classes', '4',
                               '--image_size', '16', '--out', name]) == 0
    return name


@pytest.mark.parametrize('kind', [
    ['noise'], ['generated'], ['generated', '--generator', 'spectrum'],
    ['generated', '--generator', 'deadleaves'], ['generated', '--multilabel']])
def test_fresh_draws_every_image_anew_for_its_label(kind):
    data = generate_data.read(folder_of('data/set', *kind), {'fresh': 2})
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
    assert np.array_equal(data.draw([45, 71, 48])[1:2], data.draw([71]))
    again = Batches(data, range(40), 8, torch.device('cpu'), shuffle=False, workers=2)
    assert torch.equal(torch.cat([x for x, _ in again.epoch(4, 3)]), seen[4][24:])


def test_a_drawn_image_is_that_of_its_place():
    data = generate_data.read(folder_of('data/set', 'noise'), {'fresh': 1})
    more = generate_data.noise_images(0, range(120), 16)
    assert np.array_equal(data.draw([83, 97]), more[[83, 97]])


def test_a_search_on_fresh_data_goes_on_where_it_stopped():
    flags = [*ONESHOT, '--fresh', '--workers', '0']
    whole = run(search.main, 'whole', *flags)
    stop_in_every_step(search.main, 'broken', *flags)
    same_run('whole', 'broken')
    assert whole[0] != run(search.main, 'other', *ONESHOT)[1]
    assert whole[1] != log('other')[1] and whole[0] == log('other')[0]


# Ties

def test_alphas_that_are_nearly_nothing_still_decide():
    method, network = searching('--space', 'nb201')
    with torch.no_grad():
        network.alphas['cell'].zero_()[:, 3] = 1e-9             # float32's softmax is flat
    assert network.genotype() == to_string(['nor_conv_3x3'] * 6)


def test_equal_alphas_are_broken_by_seed():
    method, network = searching('--space', 'nb201')
    with torch.no_grad():
        network.alphas['cell'].zero_()
    found = Counter(name for seed in range(50) for name in from_string(network.genotype(seed)))
    assert min(found[name] for name in CELLS) > 30              # of 60 expected
    assert network.genotype(3) == network.genotype(3)
    assert nas_bench_201()[0].keys() >= {network.genotype(4)}
