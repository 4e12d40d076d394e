"""Genotypes: what a search ends in. Their JSON, checks, published cells, random ones, drawings.

    python -c "from genotypes import *; print(to_json(random_genotype(0)))"

A genotype is two cells, normal and reduction. A cell has two inputs (states 0 and 1, the outputs
of the two cells before it) and four nodes (states 2 to 5); every node sums two operations, each
on an earlier state, and the nodes in `*_concat` are concatenated into the output (DARTS, arXiv
1806.09055, section 2.1).

In NAS-Bench-201 (arXiv 2001.00326) it is the official string of the one cell, whose node 1 has an
edge from 0, node 2 from 0 and 1, node 3, the output, from 0, 1 and 2:
`|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`. What all 15,625 are worth is known: `truth`.
"""
import csv
import gzip
import json
from bisect import bisect_left, bisect_right
from collections import namedtuple
from functools import cache
from html import escape
from pathlib import Path

import numpy as np

from operations import NB201_OPERATIONS, OPERATIONS

NODES = 4
PRIMITIVES = list(OPERATIONS)

# normal, reduce: ((operation, input state), ...), two pairs a node, nodes in order.
Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')


def plain(genotype):
    """A genotype as JSON has it: an object of the four fields, or the string."""
    return genotype if isinstance(genotype, str) else genotype._asdict()


def from_plain(value, source='genotype'):
    """The genotype that `plain` gave; ValueError names `source` and what is wrong."""
    return to_string(from_string(value, source)) if isinstance(value, str) \
        else from_json(value, source)


def to_json(genotype, **extra):
    """One line of JSON: the four fields, or `arch_str`, and whatever is given beside them."""
    fields = {'arch_str': genotype} if isinstance(genotype, str) else plain(genotype)
    return json.dumps({**fields, **extra})


def from_json(text, source='genotype'):
    """Genotype from to_json's text (or a dict); ValueError names `source` and what is wrong."""
    try:
        fields = json.loads(text) if isinstance(text, (str, bytes)) else text
    except ValueError:
        raise ValueError(f'{source}: not a JSON file') from None
    if not isinstance(fields, dict):
        raise ValueError(f'{source}: expected an object with {", ".join(Genotype._fields)}')
    if 'arch_str' in fields:
        return from_plain(str(fields['arch_str']), source)
    for name in Genotype._fields:
        if name not in fields:
            raise ValueError(f'{source}: no "{name}"')
        if not isinstance(fields[name], (list, tuple)):
            raise ValueError(f'{source}: "{name}" must be a list')
    return checked(Genotype(*(fields[name] for name in Genotype._fields)), source)


def checked(genotype, source='genotype'):
    """The genotype as plain tuples; ValueError, naming `source`, if a network cannot be built."""
    cells = []
    for cell in ('normal', 'reduce'):
        pairs, concat = getattr(genotype, cell), getattr(genotype, cell + '_concat')
        if len(pairs) != 2 * NODES:
            raise ValueError(f'{source}: {cell} has {len(pairs)} operations; {NODES} nodes with '
                             f'two each make {2 * NODES}')
        for k, pair in enumerate(pairs):
            node = 2 + k // 2
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f'{source}: {cell}[{k}] must be [operation, input state]')
            if pair[0] not in PRIMITIVES or pair[0] == 'none':
                raise ValueError(f'{source}: {cell}[{k}]: unknown operation {pair[0]!r}; known: '
                                 + ', '.join(name for name in PRIMITIVES if name != 'none'))
            if type(pair[1]) is not int or not 0 <= pair[1] < node:
                raise ValueError(f'{source}: {cell}[{k}]: node {node} has no input {pair[1]!r}; '
                                 f'its inputs are 0 to {node - 1}')
            if k % 2 and pair[1] == pairs[k - 1][1]:
                raise ValueError(f'{source}: {cell}[{k}]: node {node} takes input {pair[1]} twice')
        if not concat or any(type(n) is not int or not 2 <= n < 2 + NODES for n in concat) \
                or len(set(concat)) != len(concat):
            raise ValueError(f'{source}: {cell}_concat must list some of the nodes 2 to '
                             f'{1 + NODES}, each once')
        cells += [tuple((op, state) for op, state in pairs), tuple(concat)]
    return Genotype(*cells)


def random_genotype(seed):
    """Uniform over cells: two different inputs a node, any operation but none (the control)."""
    rng = np.random.Generator(np.random.Philox(seed))
    operations = [name for name in PRIMITIVES if name != 'none']
    concat, cells = tuple(range(2, 2 + NODES)), []
    for _ in ('normal', 'reduce'):
        cell = []
        for node in range(2, 2 + NODES):
            inputs = sorted(rng.choice(node, 2, replace=False).tolist())
            cell += [(operations[rng.integers(len(operations))], state) for state in inputs]
        cells += [tuple(cell), concat]
    return Genotype(*cells)


def agreement(a, b):
    """Share of the operations that two genotypes of one space have in common, edge by edge."""
    if isinstance(a, str):
        pairs = list(zip(from_string(a), from_string(b)))
        return sum(x == y for x, y in pairs) / len(pairs)
    same = sum(len({*x[2 * n:2 * n + 2]} & {*y[2 * n:2 * n + 2]})
               for x, y in ((a.normal, b.normal), (a.reduce, b.reduce)) for n in range(NODES))
    return same / (4 * NODES)


# ---------------------------------------------------------------------------------------------
# NAS-Bench-201: strings, and what is known of them


def to_string(operations):
    """The official string of six operations, in the order of the edges 10, 20, 21, 30, 31, 32."""
    parts = iter(operations)
    return '+'.join('|' + ''.join(f'{next(parts)}~{state}|' for state in range(node))
                    for node in (1, 2, 3))


def from_string(text, source='genotype'):
    """The six operations of an official string; ValueError names `source` and what is wrong."""
    names = [pair.split('~')[0] for node in str(text).split('+') for pair in node.split('|')
             if pair]
    for name in names:
        if name not in NB201_OPERATIONS:
            raise ValueError(f'{source}: unknown operation {name!r}; known: '
                             + ', '.join(NB201_OPERATIONS))
    if len(names) != 6 or to_string(names) != text:
        raise ValueError(f'{source}: {text!r} is not of the form '
                         '|op~0|+|op~0|op~1|+|op~0|op~1|op~2|')
    return tuple(names)


def random_string(seed):
    """Uniform over all 15,625 cells, `none` included (the control)."""
    rng = np.random.Generator(np.random.Philox(seed))
    names = list(NB201_OPERATIONS)
    return to_string(names[k] for k in rng.integers(len(names), size=6))


NB201_LARGEST = to_string(['nor_conv_3x3'] * 6)
ACCURACIES = ('cifar10', 'cifar100', 'imagenet16')


@cache
def nas_bench_201():
    """({string: row}, {data set: sorted test accuracies}) of tests/nas_bench_201.csv.gz.

    A row has test accuracies in per cent under the names in ACCURACIES, those on validation images
    under `..._valid`, and `params`. FileNotFoundError where the table is not beside this script.
    """
    path = Path(__file__).resolve().parent / 'tests' / 'nas_bench_201.csv.gz'
    names, table = list(NB201_OPERATIONS), {}
    with gzip.open(path, 'rt', newline='') as file:
        for row in csv.DictReader(line for line in file if not line.startswith('#')):
            arch = to_string(names[int(digit)] for digit in row.pop('operations'))
            table[arch] = {key: float(value) for key, value in row.items()}
            table[arch]['params'] = int(row['params'])
    return table, {name: sorted(row[name] for row in table.values()) for name in ACCURACIES}


def truth(arch):
    """What a cell of NAS-Bench-201 is worth, trained for 200 epochs (means of the official runs).

    Test accuracies in per cent by data set; `rank` on CIFAR-10, 1 for the best, and `percentile`:
    the share of cells, in per cent, that it beats, ties counted half.
    """
    table, ordered = nas_bench_201()
    row, values = table[arch], ordered['cifar10']
    below = bisect_left(values, row['cifar10'])
    upto = bisect_right(values, row['cifar10'])
    return {**{name: row[name] for name in ACCURACIES}, 'rank': len(values) - upto + 1,
            'percentile': 50 * (below + upto) / len(values)}


# ---------------------------------------------------------------------------------------------
# Published cells


def published(normal, reduce):
    """Cells written `op:input op:input ...`, all four nodes concatenated."""
    cells = [tuple((op, int(state)) for op, state in (pair.split(':') for pair in cell.split()))
             for cell in (normal, reduce)]
    concat = tuple(range(2, 2 + NODES))
    return Genotype(cells[0], concat, cells[1], concat)


# DARTS, first and second order on CIFAR-10 (arXiv 1806.09055)
DARTS_V1 = published(
    'sep_conv_3x3:1 sep_conv_3x3:0 skip_connect:0 sep_conv_3x3:1 '
    'skip_connect:0 sep_conv_3x3:1 sep_conv_3x3:0 skip_connect:2',
    'max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:0 '
    'max_pool_3x3:0 skip_connect:2 skip_connect:2 avg_pool_3x3:0')
DARTS_V2 = published(
    'sep_conv_3x3:0 sep_conv_3x3:1 sep_conv_3x3:0 sep_conv_3x3:1 '
    'sep_conv_3x3:1 skip_connect:0 skip_connect:0 dil_conv_3x3:2',
    'max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:1 '
    'max_pool_3x3:0 skip_connect:2 skip_connect:2 max_pool_3x3:1')
# P-DARTS on CIFAR-10 (arXiv 1904.12760)
PDARTS = published(
    'skip_connect:0 dil_conv_3x3:1 skip_connect:0 sep_conv_3x3:1 '
    'sep_conv_3x3:1 sep_conv_3x3:3 sep_conv_3x3:0 dil_conv_5x5:4',
    'avg_pool_3x3:0 sep_conv_5x5:1 sep_conv_3x3:0 dil_conv_5x5:2 '
    'max_pool_3x3:0 dil_conv_3x3:1 dil_conv_3x3:1 dil_conv_5x5:3')
# PC-DARTS on CIFAR-10 and on ImageNet (arXiv 1907.05737)
PC_DARTS_cifar = published(
    'sep_conv_3x3:1 skip_connect:0 sep_conv_3x3:0 dil_conv_3x3:1 '
    'sep_conv_5x5:0 sep_conv_3x3:1 avg_pool_3x3:0 dil_conv_3x3:1',
    'sep_conv_5x5:1 max_pool_3x3:0 sep_conv_5x5:1 sep_conv_5x5:2 '
    'sep_conv_3x3:0 sep_conv_3x3:3 sep_conv_3x3:1 sep_conv_3x3:2')
PC_DARTS_image = published(
    'skip_connect:1 sep_conv_3x3:0 sep_conv_3x3:0 skip_connect:1 '
    'sep_conv_3x3:1 sep_conv_3x3:3 sep_conv_3x3:1 dil_conv_5x5:4',
    'sep_conv_3x3:0 skip_connect:1 dil_conv_5x5:2 max_pool_3x3:1 '
    'sep_conv_3x3:2 sep_conv_3x3:1 sep_conv_5x5:0 sep_conv_3x3:3')

PUBLISHED = {'DARTS_V1': DARTS_V1, 'DARTS_V2': DARTS_V2, 'PDARTS': PDARTS,
             'PC_DARTS_cifar': PC_DARTS_cifar, 'PC_DARTS_image': PC_DARTS_image}


# ---------------------------------------------------------------------------------------------
# Drawing

COLOURS = {'max_pool_3x3': '#b7791f', 'avg_pool_3x3': '#d69e2e', 'skip_connect': '#718096',
           'sep_conv_3x3': '#2b6cb0', 'sep_conv_5x5': '#1a365d', 'dil_conv_3x3': '#2f855a',
           'dil_conv_5x5': '#1c4532', 'nor_conv_3x3': '#2b6cb0', 'nor_conv_1x1': '#2f855a'}


def draw(genotype, title=''):
    """SVG text: the cells, one above the other, `title` over them.

    The states stand in a row; each operation is an arc from its input to its node, in its own
    colour, and a bar below collects the nodes that are concatenated into the output.
    """
    if isinstance(genotype, str):
        edges = [(node, state) for node in (1, 2, 3) for state in range(node)]
        arcs = [(op, *edge) for op, edge in zip(from_string(genotype), edges) if op != 'none']
        cells = [('cell', arcs, ['input', '1', '2', 'output'], ())]
    else:
        labels = ['c_{k-2}', 'c_{k-1}', *map(str, range(NODES))]
        cells = [(name, [(op, 2 + k // 2, state) for k, (op, state) in enumerate(pairs)], labels,
                  concat)
                 for name, pairs, concat in (
                     ('normal cell', genotype.normal, genotype.normal_concat),
                     ('reduction cell', genotype.reduce, genotype.reduce_concat))]
    height = 40 + 312 * len(cells)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-size="13" '
             'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
             f'<rect width="720" height="{height}" fill="white"/>',
             f'<text x="360" y="26" font-size="15" fill="#1a202c">{escape(title)}</text>']
    for k, cell in enumerate(cells):
        top = 36 + 312 * k
        parts += [f'<g transform="translate(0 {top})">', cell_svg(*cell), '</g>']
    return '\n'.join(parts + ['</svg>\n'])


def cell_svg(name, edges, labels, concat):
    """One cell in a field of 720 x 312, states at y = 232; edges: (operation, node, state)."""
    step = 550 // (len(labels) - 1)
    x = [60 + step * state for state in range(len(labels))]
    arcs, words = [], []
    for op, node, state in edges:
        colour = COLOURS.get(op, '#805ad5')
        left, right, apex = x[state], x[node], 224 - 38 * (node - state)
        control = 216 - (216 - apex) * 4 / 3          # a cubic's apex is at 3/4 of its controls
        arcs.append(f'<path d="M{left} 216 C{left} {control:.0f} {right} {control:.0f} {right} '
                    f'216" fill="none" stroke="{colour}" stroke-width="2"/>')
        place = f'<text x="{(left + right) / 2}" y="{apex + 4}" '
        words += [f'{place}stroke="white" stroke-width="5" fill="white">{escape(op)}</text>',
                  f'{place}fill="{colour}">{escape(op)}</text>']        # over a white halo
    states = []
    inputs = len(labels) - NODES if concat else 1
    for state, label in enumerate(labels):
        fill = '#e2e8f0' if state < inputs else '#bee3f8'
        states.append(f'<rect x="{x[state] - 28}" y="216" width="56" height="32" rx="8" '
                      f'fill="{fill}"/><text x="{x[state]}" y="237">{label}</text>')
    stems = [f'<path d="M{x[node]} 248 V272" stroke="#a0aec0" stroke-width="2"/>'
             for node in concat]
    bar = (f'<path d="M{x[min(concat)]} 272 H640" stroke="#a0aec0" stroke-width="2"/>'
           '<rect x="632" y="256" width="64" height="32" rx="8" fill="#fefcbf"/>'
           '<text x="664" y="277">c_{k}</text>') if concat else ''
    title = f'<text x="16" y="20" text-anchor="start" font-weight="bold">{name}</text>'
    return '\n'.join([title] + arcs + words + states + stems + [bar])
