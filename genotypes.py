"""Genotypes: what a search ends in. Their JSON, checks, published cells, random ones, drawings.

    python -c "from genotypes import *; print(to_json(random_cell('darts', 0)))"

A genotype of DARTS (arXiv 1806.09055, section 2.1) is two cells, normal and reduction. A cell has
two inputs, states 0 and 1, the outputs of the two cells before it, and four nodes, states 2 to 5.
Every node sums two operations on earlier states; the nodes in `*_concat` make the output.

A genotype of NAS-Bench-201 (arXiv 2001.00326) is the official string of its one cell, operations
by node and input: `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`. All 15,625 were trained: see `truth`.
"""
import ast
import csv
import gzip
import json
import os
from bisect import bisect_left, bisect_right
from collections import namedtuple
from functools import cache
from html import escape
from pathlib import Path

import numpy as np

from generate_data import UserError, readable
from operations import NB201_OPERATIONS, OPERATIONS

NODES = 4

# normal, reduce: ((operation, input state), ...), two pairs per node, nodes in order.
Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')
ALL_NODES = tuple(range(2, 2 + NODES))


def plain(genotype):
    """A genotype as JSON has it: an object of the four fields, or the string."""
    return genotype if isinstance(genotype, str) else genotype._asdict()


def from_plain(value, source='genotype'):
    """The genotype of a string or of a JSON object; UserError names `source` and what is wrong."""
    if isinstance(value, dict):
        value = value.get('arch_str', value)
    if isinstance(value, str):
        return to_string(from_string(value, source))
    cells, known = [], OPERATIONS.keys() - {'none'}
    with readable(f'{source}: no genotype', f'It has "normal" and "reduce", each {2 * NODES} pairs '
                  '[operation, input state], and "normal_concat" and "reduce_concat".'):
        for cell in ('normal', 'reduce'):
            pairs = tuple((str(name), int(state)) for name, state in value[cell])
            if len(pairs) != 2 * NODES:
                raise ValueError(f'{cell} has {len(pairs)} operations')
            for k, (name, state) in enumerate(pairs):
                twice = k % 2 and state == pairs[k - 1][1]
                if name not in known:
                    raise ValueError(f'{cell}[{k}] is {name}; known: {", ".join(sorted(known))}')
                if not 0 <= state < 2 + k // 2 or twice:
                    raise ValueError(f'{cell}[{k}] cannot be {name}:{state}')
            concat = tuple(map(int, value[cell + '_concat']))
            if not concat or len({*concat}) < len(concat) or not {*concat} <= {*ALL_NODES}:
                raise ValueError(f'{cell}_concat cannot be {concat}')
            cells += [pairs, concat]
    return Genotype(*cells)


def to_json(genotype, **extra):
    """One line of JSON: the four fields, or `arch_str`, and whatever is given beside them."""
    fields = {'arch_str': genotype} if isinstance(genotype, str) else plain(genotype)
    return json.dumps({**fields, **extra})


def random_cell(space, seed):
    """A genotype, uniform over all of a space (the control).

    In darts a node has two different inputs, and any operation but none.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    if space == 'nb201':
        names = list(NB201_OPERATIONS)
        return to_string(names[k] for k in rng.integers(len(names), size=6))
    operations, pairs = [name for name in OPERATIONS if name != 'none'], []
    for node in ALL_NODES * 2:                  # of the normal cell, then of the reduction cell
        inputs = sorted(rng.choice(node, 2, replace=False).tolist())
        pairs += [(operations[rng.integers(len(operations))], state) for state in inputs]
    return Genotype(tuple(pairs[:8]), ALL_NODES, tuple(pairs[8:]), ALL_NODES)


# ---- What --arch names ----------------------------------------------------------------------


def parse_darts(text):
    """{field: value} of `Genotype(normal=[...], normal_concat=range(2, 6), ...)` in a line of text.

    Nothing of it is run.
    """
    if text.count('Genotype(') != 1:
        raise ValueError(f'it has {text.count("Genotype(")} of Genotype(...)')
    text = text[text.find('Genotype('):text.rfind(')') + 1]
    text = text.replace('range(2,6)', 'range(2, 6)').replace('range(2, 6)', '(2, 3, 4, 5)')
    words = ast.parse(text, mode='eval').body.keywords
    return {word.arg: ast.literal_eval(word.value) for word in words}


def find_genotype(arch):
    """(genotype, found_by) of what `--arch` names; UserError says in one line what is wrong.

    arch: a published name (unless a search is called so), a string of NAS-Bench-201, a search, its
    genotype.json, or a file in DARTS's words. found_by has `data`, None if there was no search, and
    `method`; of a search also `seed`, `arch_data` and `settings`.
    """
    if arch in PUBLISHED and not Path(arch, 'genotype.json').exists():
        return PUBLISHED[arch], {'data': None, 'method': arch}
    if arch.startswith('|'):
        return from_plain(arch, '--arch'), {'data': None, 'method': short_name(arch)}
    path = Path(arch, 'genotype.json') if os.path.isdir(arch) else Path(arch)
    if not os.path.isfile(path):
        raise UserError(f'--arch {arch:.60}: neither a genotype.json, nor a search that has ended, '
                        f'nor one of {", ".join(PUBLISHED)}')
    with readable(f'{path}: no genotype', 'It must have a JSON object, or one Genotype(...) as '
                  'DARTS writes it.'):
        text = path.read_text().strip()
        fields = json.loads(text) if text[:1] == '{' else parse_darts(text)
        found_by = {key: fields.get(key) for key in ('data', 'method', 'seed', 'arch_data')}
    about = path.with_name('args.json')
    if path.name == 'genotype.json' and about.exists():
        with readable(f'{about} is damaged', 'Search again, or remove it.'):
            content = json.loads(about.read_text())
            found_by['settings'] = {**content['settings'], 'code': content.get('code')}
    found_by['method'] = found_by['method'] or path.stem
    return from_plain(fields, str(path)), found_by


def short_name(arch):
    """nb201- and the numbers of the six operations of a string, for the names of runs."""
    names = list(NB201_OPERATIONS)
    return 'nb201-' + ''.join(str(names.index(name)) for name in from_string(arch))


# ---- NAS-Bench-201: strings, and what is known of them --------------------------------------

NB201_EDGES = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]      # (node, input state)


def to_string(operations):
    """The official string of six operations, in the order of NB201_EDGES."""
    return '|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|'.format(*operations)


def from_string(text, source='genotype'):
    """The six operations of an official string; UserError names `source` and what is wrong."""
    names = [pair.split('~')[0] for pair in text.replace('+', '').split('|') if pair]
    if len(names) != 6 or to_string(names) != text or not {*names} <= {*NB201_OPERATIONS}:
        raise UserError(f'{source}: {text[:150]!r} is not of the form {to_string(["op"] * 6)}, '
                        f'where op is one of {", ".join(NB201_OPERATIONS)}')
    return tuple(names)


def expression(arch):
    """(what a cell computes, as text that equal cells share; the edges on its paths).

    A skip is written as the node that it starts from, # is nothing. So 6,466 cells differ.
    """
    names, nodes = iter(from_string(arch)), [('x', ())]
    for node in range(1, 4):
        terms, needed = [], []
        for state in range(node):
            name, (text, edges) = next(names), nodes[state]
            if name == 'none' or text == '#':
                terms.append('#')
                continue
            terms.append(text if name == 'skip_connect' else f'({text})@{name}')
            if text.strip('#+'):                # else nothing arrives
                needed += [*edges, (node, state)]
        nodes.append(('+'.join(sorted(terms)), tuple(dict.fromkeys(needed))))
    return nodes[-1]


@cache
def distinct_cells():
    """The 6,466 cells that NAS-Bench-201 counts as different: the first of each."""
    cells = {}
    for arch in nas_bench_201()[0]:
        cells.setdefault(expression(arch)[0], arch)
    return list(cells.values())


NB201_LARGEST = to_string(['nor_conv_3x3'] * 6)
ACCURACIES = ('cifar10', 'cifar100', 'imagenet16')


@cache
def nas_bench_201():
    """({string: row}, sorted test accuracies on CIFAR-10) of tests/nas_bench_201.csv.gz.

    A row: accuracies in per cent, on test images and on validation ones (`..._valid`), `params`.
    """
    path = Path(__file__).resolve().parent / 'tests' / 'nas_bench_201.csv.gz'
    names, table = list(NB201_OPERATIONS), {}
    with gzip.open(path, 'rt', newline='') as file:
        for row in csv.DictReader(line for line in file if not line.startswith('#')):
            arch = to_string(names[int(digit)] for digit in row.pop('operations'))
            table[arch] = {key: float(value) for key, value in row.items()}
            table[arch]['params'] = int(row['params'])
    return table, sorted(row['cifar10'] for row in table.values())


def truth(arch):
    """Official accuracies of a cell of NAS-Bench-201, in per cent, after 200 epochs, by data set.

    With them, on CIFAR-10, its `percentile`: how many per cent of all cells it beats, ties counted
    half.
    """
    table, values = nas_bench_201()
    known = {name: table[arch][name] for name in ACCURACIES}
    place = bisect_left(values, known['cifar10']) + bisect_right(values, known['cifar10'])
    return {**known, 'percentile': 50 * place / len(values)}


# ---- Published cells ------------------------------------------------------------------------


def parse_cells(normal, reduce):
    """The genotype of two cells written `op:input op:input ...`, all four nodes concatenated."""
    cells = []
    for text in (normal, reduce):
        pairs = [pair.split(':') for pair in text.split()]
        cells += [tuple((name, int(state)) for name, state in pairs), ALL_NODES]
    return Genotype(*cells)


# DARTS, first and second order on CIFAR-10 (arXiv 1806.09055)
DARTS_V1 = parse_cells(
    'sep_conv_3x3:1 sep_conv_3x3:0 skip_connect:0 sep_conv_3x3:1 '
    'skip_connect:0 sep_conv_3x3:1 sep_conv_3x3:0 skip_connect:2',
    'max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:0 '
    'max_pool_3x3:0 skip_connect:2 skip_connect:2 avg_pool_3x3:0')
DARTS_V2 = parse_cells(
    'sep_conv_3x3:0 sep_conv_3x3:1 sep_conv_3x3:0 sep_conv_3x3:1 '
    'sep_conv_3x3:1 skip_connect:0 skip_connect:0 dil_conv_3x3:2',
    'max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:1 '
    'max_pool_3x3:0 skip_connect:2 skip_connect:2 max_pool_3x3:1')
# P-DARTS on CIFAR-10 (arXiv 1904.12760)
PDARTS = parse_cells(
    'skip_connect:0 dil_conv_3x3:1 skip_connect:0 sep_conv_3x3:1 '
    'sep_conv_3x3:1 sep_conv_3x3:3 sep_conv_3x3:0 dil_conv_5x5:4',
    'avg_pool_3x3:0 sep_conv_5x5:1 sep_conv_3x3:0 dil_conv_5x5:2 '
    'max_pool_3x3:0 dil_conv_3x3:1 dil_conv_3x3:1 dil_conv_5x5:3')
# PC-DARTS on CIFAR-10 and on ImageNet (arXiv 1907.05737)
PC_DARTS_cifar = parse_cells(
    'sep_conv_3x3:1 skip_connect:0 sep_conv_3x3:0 dil_conv_3x3:1 '
    'sep_conv_5x5:0 sep_conv_3x3:1 avg_pool_3x3:0 dil_conv_3x3:1',
    'sep_conv_5x5:1 max_pool_3x3:0 sep_conv_5x5:1 sep_conv_5x5:2 '
    'sep_conv_3x3:0 sep_conv_3x3:3 sep_conv_3x3:1 sep_conv_3x3:2')
PC_DARTS_image = parse_cells(
    'skip_connect:1 sep_conv_3x3:0 sep_conv_3x3:0 skip_connect:1 '
    'sep_conv_3x3:1 sep_conv_3x3:3 sep_conv_3x3:1 dil_conv_5x5:4',
    'sep_conv_3x3:0 skip_connect:1 dil_conv_5x5:2 max_pool_3x3:1 '
    'sep_conv_3x3:2 sep_conv_3x3:1 sep_conv_5x5:0 sep_conv_3x3:3')

PUBLISHED = {'DARTS_V1': DARTS_V1, 'DARTS_V2': DARTS_V2, 'PDARTS': PDARTS,
             'PC_DARTS_cifar': PC_DARTS_cifar, 'PC_DARTS_image': PC_DARTS_image,
             'NB201_LARGEST': NB201_LARGEST}


# ---- Drawing --------------------------------------------------------------------------------

COLOURS = {'max_pool_3x3': '#b7791f', 'avg_pool_3x3': '#d69e2e', 'skip_connect': '#718096',
           'sep_conv_3x3': '#2b6cb0', 'sep_conv_5x5': '#1a365d', 'dil_conv_3x3': '#2f855a',
           'dil_conv_5x5': '#1c4532', 'nor_conv_3x3': '#2b6cb0', 'nor_conv_1x1': '#2f855a',
           'none': '#a0aec0'}


def draw(genotype, title=''):
    """SVG text: the cells, one above the other, `title` over them.

    The states stand in a row; each operation is an arrow from its input to its node, in its own
    colour (dashed: none), and a bar below collects the nodes that are concatenated. Nodes are
    numbered from 0, as in DARTS's own drawings.
    """
    if isinstance(genotype, str):
        edges = [(op, *edge) for op, edge in zip(from_string(genotype), NB201_EDGES)]
        cells, labels = [('cell', edges, ())], ['input', '1', '2', 'output']
        title += f' (CIFAR-10 {truth(genotype)["cifar10"]:.2f}%, known)'
    else:
        cells, labels = [], ['c_{k-2}', 'c_{k-1}', *map(str, range(NODES))]
        for cell, name in (('normal', 'normal cell'), ('reduce', 'reduction cell')):
            pairs = enumerate(getattr(genotype, cell))
            edges = [(op, 2 + k // 2, state) for k, (op, state) in pairs]
            cells.append((name, edges, getattr(genotype, cell + '_concat')))
    height = 40 + 312 * len(cells)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-size="13" '
             'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
             '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
             'markerHeight="6" orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="#4a5568"/>'
             f'</marker></defs><rect width="720" height="{height}" fill="white"/>',
             f'<text x="360" y="26" font-size="15" fill="#1a202c">{escape(title)}</text>']
    for k, (name, edges, concat) in enumerate(cells):
        parts += [f'<g transform="translate(0 {36 + 312 * k})">',
                  f'<text x="16" y="20" text-anchor="start" font-weight="bold">{name}</text>',
                  *cell_svg(edges, labels, concat), '</g>']
    return '\n'.join([*parts, '</svg>\n'])


def cell_svg(edges, labels, concat):
    """SVG elements of a cell, 720 x 312, states at y = 232. edges: (operation, node, state)."""
    x = [60 + 550 // (len(labels) - 1) * state for state in range(len(labels))]
    arcs, words, states = [], [], []
    for op, node, state in edges:
        colour = COLOURS.get(op, '#805ad5')
        left, right, apex = x[state], x[node], 224 - 38 * (node - state)
        control = 216 - (216 - apex) * 4 / 3          # a cubic's apex is at 3/4 of its controls
        dashes = ' stroke-dasharray="3 5"' if op == 'none' else ' marker-end="url(#tip)"'
        arcs.append(f'<path d="M{left} 216 C{left} {control:.0f} {right} {control:.0f} {right} '
                    f'216" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        words.append(f'<text x="{(left + right) / 2}" y="{apex + 4}" fill="{colour}" '
                     f'stroke="white" stroke-width="5" paint-order="stroke">{escape(op)}</text>')
    for state, label in enumerate(labels):
        fill = '#bee3f8' if any(node == state for _, node, _ in edges) else '#e2e8f0'
        states.append(f'<rect x="{x[state] - 28}" y="216" width="56" height="32" rx="8" '
                      f'fill="{fill}"/><text x="{x[state]}" y="237">{label}</text>')
    lines = [f'M{x[node]} 248 V272' for node in concat]
    if concat:
        states.append(f'<path d="{" ".join(lines)} M{x[min(concat)]} 272 H640" stroke="#a0aec0" '
                      'stroke-width="2"/><rect x="632" y="256" width="64" height="32" rx="8" '
                      'fill="#fefcbf"/><text x="664" y="277">c_{k}</text>')
    return arcs + words + states
