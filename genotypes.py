"""Genotypes: what a search ends in. Their JSON, checks, published cells, random ones, drawings.

    python -c "from genotypes import *; print(to_json(random_genotype(0)))"

A genotype is two cells, normal and reduction. A cell has two inputs (states 0 and 1, the outputs
of the two cells before it) and four nodes (states 2 to 5); every node sums two operations, each
on an earlier state, and the nodes in `*_concat` are concatenated into the output (DARTS, arXiv
1806.09055, section 2.1).
"""
import json
from collections import namedtuple
from html import escape

import numpy as np

from operations import OPERATIONS

NODES = 4
PRIMITIVES = list(OPERATIONS)

# normal, reduce: ((operation, input state), ...), two pairs a node, nodes in order.
Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')


def to_json(genotype, **extra):
    """One line of JSON with the four fields and whatever is given beside them."""
    return json.dumps({**genotype._asdict(), **extra})


def from_json(text, source='genotype'):
    """Genotype from to_json's text (or a dict); ValueError names `source` and what is wrong."""
    try:
        fields = json.loads(text) if isinstance(text, (str, bytes)) else text
    except ValueError:
        raise ValueError(f'{source}: not a JSON file') from None
    if not isinstance(fields, dict):
        raise ValueError(f'{source}: expected an object with {", ".join(Genotype._fields)}')
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
           'dil_conv_5x5': '#1c4532'}


def draw(genotype, title=''):
    """SVG text: the normal cell above the reduction cell, `title` over both.

    The states stand in a row; each operation is an arc from its input to its node, in its own
    colour, and a bar below collects the nodes that are concatenated into the output.
    """
    cells = [('normal cell', genotype.normal, genotype.normal_concat),
             ('reduction cell', genotype.reduce, genotype.reduce_concat)]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 664" font-size="13" '
             'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
             '<rect width="720" height="664" fill="white"/>',
             f'<text x="360" y="26" font-size="15" fill="#1a202c">{escape(title)}</text>']
    for k, (name, pairs, concat) in enumerate(cells):
        top = 36 + 312 * k
        parts += [f'<g transform="translate(0 {top})">', cell_svg(name, pairs, concat), '</g>']
    return '\n'.join(parts + ['</svg>\n'])


def cell_svg(name, pairs, concat):
    """One cell in a field of 720 x 312; states stand at y = 232."""
    x = [60 + 110 * state for state in range(2 + NODES)]
    arcs, labels = [], []
    for k, (op, state) in enumerate(pairs):
        node, colour = 2 + k // 2, COLOURS.get(op, '#805ad5')
        left, right, apex = x[state], x[node], 224 - 38 * (node - state)
        control = 216 - (216 - apex) * 4 / 3          # a cubic's apex is at 3/4 of its controls
        arcs.append(f'<path d="M{left} 216 C{left} {control:.0f} {right} {control:.0f} {right} '
                    f'216" fill="none" stroke="{colour}" stroke-width="2"/>')
        place = f'<text x="{(left + right) / 2}" y="{apex + 4}" '
        labels += [f'{place}stroke="white" stroke-width="5" fill="white">{escape(op)}</text>',
                   f'{place}fill="{colour}">{escape(op)}</text>']       # over a white halo
    states = []
    for state in range(2 + NODES):
        label = ('c_{k-2}', 'c_{k-1}')[state] if state < 2 else str(state - 2)
        fill = '#e2e8f0' if state < 2 else '#bee3f8'
        states.append(f'<rect x="{x[state] - 28}" y="216" width="56" height="32" rx="8" '
                      f'fill="{fill}"/><text x="{x[state]}" y="237">{label}</text>')
    stems = [f'<path d="M{x[node]} 248 V272" stroke="#a0aec0" stroke-width="2"/>'
             for node in concat]
    bar = (f'<path d="M{x[min(concat)]} 272 H640" stroke="#a0aec0" stroke-width="2"/>'
           '<rect x="632" y="256" width="64" height="32" rx="8" fill="#fefcbf"/>'
           '<text x="664" y="277">c_{k}</text>')
    title = f'<text x="16" y="20" text-anchor="start" font-weight="bold">{name}</text>'
    return '\n'.join([title] + arcs + labels + states + stems + [bar])
