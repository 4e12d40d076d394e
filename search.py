"""Search a cell on unreal or real data, by gradient or by scoring cells; ends in a genotype.

    python search.py --data noise --gpu 0                          # DARTS, first order, 50 epochs
    python search.py --data noise --method pcdarts --gpu 0
    python search.py --data random_labels --unrolled --gpu 0       # second order
    python search.py --data cifar10 --space nb201 --method gdas --gpu 0
    python search.py --data noise --preset laptop                  # minutes on a CPU, and the truth
    python search.py --data generated --method oneshot --preset laptop     # scores all cells
    torchrun --nproc_per_node 8 search.py --data imagenet --data_dir DIR --method pcdarts --resume
    for s in 0 1 2 3; do python search.py --data noise --seed $s --gpu 0 --resume; done

--resume goes on from the last checkpoint, starts a run that has none and skips one that is done.
Missing unreal data are made first. A method is a class that overrides what differs from DARTS.
Sources: DARTS (arXiv 1806.09055), PC-DARTS (1907.05737), P-DARTS (1904.12760), GDAS (1910.04465),
SDARTS (2002.05283), DARTS- (2009.01027), beta-DARTS (2203.01665), RobustDARTS (1909.09656), SPOS
(1904.00420), random search with shared weights (1902.07638), RLNAS (2101.11834), NASWOT
(2006.04647), SynFlow (2006.05467), SNIP (1810.02340).
"""
import math
import os
import shlex
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

# Before torch: generate_data sets how OpenMP's threads wait.
from generate_data import (CIFAR, DEFAULTS, KINDS, REAL, Batches, Progress, Setting, UserError,
                           auto_augment, choose_device, evenly, find_or_make, is_first, kind_of,
                           leave, num_processes, number, one_line_errors, refuse_idle, set_tf32,
                           world, write_file)
from evaluate import correct, data_name, gather, loss_of, method_name, read_json, write_csv
from retrain import (INPUT, NETWORK, RUN, SCHEDULE, GraphedStep, Run, average, batch_of, draw_apart,
                     endless, learning_rate_at, make_optimizer, peak_memory_mib, run_name, settle,
                     start_alike, stem_for, tensors_of_a_step)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from genotypes import (distinct_cells, draw, expression, find_genotype, from_plain, from_string,
                       plain, random_cell, to_json, truth)
from model_search import DARTS, EDGES, NB201, Drawn, Network, cell_edges, derive
from operations import (DilConv, DroppedSkip, FactorizedReduce, ReLUConvBN, SepConv, dropped_skip,
                        skip_connect)

# ---- Settings. Defaults are DARTS's; a method's own are in its class. -----------------------

SEARCH = {
    'space': Setting('darts', 'in nb201 the truth is known', ['darts', 'nb201']),
    'unrolled': Setting(False, 'second-order step'),
    'arch_data': Setting('valid', "alphas' images; valid: held out", ['valid', 'train', 'none']),
    'perturb': Setting('random', 'perturbation of sdarts', ['random', 'adversarial']),
    'partial': Setting(1, 'operations see 1/partial of the channels', number(int, 1)),
    'init_channels': Setting(16, 'channels of the first cell', number(int, 2)),
    'layers': Setting(8, 'cells; of pdarts in its first stage', number(int, 3, 200)),
    'cells_per_stage': Setting(5, 'of nb201', number(int, 1, 60)),
    'stem': NETWORK['stem'],
    'train_portion': Setting(0.5, "the weights' share of the images, or how many (to a half)",
                             number(float, 0)),
    'valid_fraction': Setting(None, "the alphas' share", number(float, 0, 1)),
    'arch_learning_rate': Setting(3e-4, 'of the alphas', number(float, 0)),
    'arch_weight_decay': Setting(1e-3, 'of the alphas', number(float, 0)),
    'frozen_epochs': Setting(0, 'first epochs, of the weights alone', number(int, 0)),
    'hessian': Setting(None, "log the Hessian's largest eigenvalue every X epochs", number(int, 1)),
    'early_stop': Setting(False, 'stop when that eigenvalue grows (RobustDARTS)'),
    'candidates': Setting(None, 'cells to score; else all of nb201, 1000 of darts', number(int, 1)),
    'score': Setting('auto', 'by which oneshot takes a cell; auto: valid_loss, of random labels '
                     'train_loss', ['auto', 'valid_loss', 'train_loss', 'valid_accuracy', 'angle']),
    'repeats': Setting(3, 'untrained networks over which a score is averaged', number(int, 1)),
}
# Those that mean nothing for methods that score cells
ALPHAS = ('unrolled', 'arch_data', 'partial', 'arch_learning_rate', 'arch_weight_decay',
          'frozen_epochs', 'hessian', 'early_stop')
# arch_grad_clip: largest norm of the alphas' gradient, 0: no limit. It has no flag.
COMMON = dict(batch_size=64, learning_rate=0.025, learning_rate_min=0.001, nesterov=False,
              arch_grad_clip=0.0, schedule='cosine', least_batches=0)
SPACES = {'darts': {}, 'nb201': dict(nesterov=True, weight_decay=5e-4)}     # of its own searches
# ImageNet: as PC-DARTS searched on it (section 4.3), with the learning rate for 1,024 images.
# CheXpert: our own choice. laptop: our own, minutes on two cores, for which the alphas move faster.
PRESETS = {
    'cifar': {},
    'imagenet': dict(image_size=224, num_classes=1000, num_images=128000, source='imagenet',
                     batch_size=1024, rate_for=1024, learning_rate=0.5, learning_rate_min=0.0,
                     warmup_epochs=5, arch_learning_rate=6e-3, arch_grad_clip=5.0,
                     frozen_epochs=35, train_portion=0.1, valid_fraction=0.025),
    'chexpert': dict(image_size=224, num_classes=14, num_images=20000, multilabel=True,
                     source='chexpert', train_portion=0.1, valid_fraction=0.1),
    'laptop': dict(space='nb201', cells_per_stage=1, image_size=16, epochs=50, steps_per_epoch=20,
                   batch_size=64, arch_learning_rate=3e-3, least_batches=20)}
QUICK = dict(num_images=1000, layers=5, cells_per_stage=1, init_channels=8, batch_size=32,
             epochs=3, warmup_epochs=0, steps_per_epoch=4, frozen_epochs=0,
             arch_learning_rate=3e-3, train_portion=0.5, valid_fraction=None, candidates=100,
             repeats=1)


# ---- Methods --------------------------------------------------------------------------------


class Darts:
    """DARTS (arXiv 1806.09055): the alphas follow the loss of held-out images; nothing is added.

    recipe: the settings that differ from DARTS's; recipe_on: those by space or preset. flags: what
    it takes of the flags that not all methods take. operations, extras: changes of the Space.
    MORE_CELLS: by stage. stochastic: each forward pass draws what it computes, so that two losses
    cannot be compared. one_path: one operation per edge is computed. searches: False for a cell
    drawn at random. scores: what ranks cells; then nothing trains alphas. trains: whether weights
    train.
    """
    recipe, recipe_on, operations, extras, flags = {}, {}, {}, {}, ALPHAS
    spaces, stages, MORE_CELLS = ('darts', 'nb201'), 1, (0,)
    searches, stochastic, one_path, trains, scores = True, False, False, True, ()

    def __init__(self, args, num_classes, stem, device, batches=()):
        self.args, self.num_classes, self.stem, self.device = args, num_classes, stem, device
        self.batches = batches
        self.stage, self.kept = 0, None         # of P-DARTS: the stage, operations of each edge

    def build(self):
        """A new supernet; returns it."""
        args = self.args
        space, layers = DARTS, args.layers + self.MORE_CELLS[self.stage]
        if args.space == 'nb201':
            space, layers = NB201, 3 * args.cells_per_stage + 2
        operations = {**space.operations, **self.operations}
        space = space._replace(operations=operations, extras=self.extras)
        self.network = Network(args.init_channels, self.num_classes, layers, partial=args.partial,
                               stem=self.stem, space=space, kept=self.kept,
                               width=1 if self.one_path else None).to(self.device)
        self.network.softmax, self.network.mix = self.probabilities, self.mix
        start_alike(self.network)
        return self.network

    def begin_epoch(self, epoch, epochs):
        """Set the numbers of this epoch, and return them for the log; `epochs`: of the stage.

        What a step reads of it must be a plain value of the method, or a tensor: see set_tensors.
        """
        return {}

    def set_tensors(self, **numbers):
        """Keep numbers as tensors, so that one CUDA graph is enough; return them for the log."""
        for name, value in numbers.items():
            vars(self).setdefault(name, torch.zeros((), device=self.device)).fill_(value)
        return numbers

    def probabilities(self, alpha):
        """What the alphas stand for, both (edges, operations); the genotype is taken from it."""
        return F.softmax(alpha, 1)

    def mix(self, cell_type, p):
        """Weights of the operations in a forward pass, from their probabilities p."""
        return p

    def alpha_loss(self):
        """What is added to the loss of the alphas, a scalar, or None."""
        return None

    def weight_training(self, train):
        """A context around the gradients of the weights on a training batch."""
        return nullcontext()

    def result(self):
        """(genotype, what genotype.json says beside it)."""
        return self.network.genotype(self.args.seed), {}


class PcDarts(Darts):
    """PC-DARTS (1907.05737): operations see 1/4 of the channels, and edges have shares."""
    recipe = dict(batch_size=256, learning_rate=0.1, learning_rate_min=0.0,
                  arch_learning_rate=6e-4, frozen_epochs=15, partial=4)
    recipe_on = {'imagenet': dict(partial=2)}


class PDarts(Darts):
    """P-DARTS (1904.12760): three stages, each with more cells and fewer operations per edge.

    Skips have dropout. In a stage it falls linearly while the alphas are frozen; then it starts
    again from its full value and decays. The final normal cell has two skips at most.
    """
    recipe = dict(epochs=75, batch_size=96, learning_rate_min=0.0, arch_learning_rate=6e-4,
                  arch_grad_clip=5.0, frozen_epochs=10, layers=5)
    # ImageNet's preset has 35. For the laptop 7 of 50 epochs is the share of 10 of 75.
    recipe_on = {'imagenet': dict(frozen_epochs=10), 'laptop': dict(frozen_epochs=7)}
    spaces, stages, stochastic, operations = ('darts',), 3, True, {'skip_connect': dropped_skip}
    # By stage: cells more than in the first, operations that an edge keeps, dropout of skips
    MORE_CELLS, KEEP, DROPOUT = (0, 6, 12), (None, 5, 3), (0.0, 0.4, 0.7)

    def build(self):
        network = super().build()
        draw_apart(self.args.seed + self.stage)         # each process drops elements of its own
        return network

    def next_stage(self):
        """Keep the strongest operations of each edge, in the space's order."""
        self.stage += 1
        names, self.kept = list(self.network.space.operations), {}
        weights = self.network.choice_weights(self.args.seed)
        for cell_type, p in zip(self.network.space.cell_types, weights):
            order = p.argsort(dim=1, descending=True, stable=True)
            self.kept[cell_type] = []
            for row in order[:, :self.KEEP[self.stage]].sort(1).values:
                self.kept[cell_type].append([names[k] for k in row])

    def begin_epoch(self, epoch, epochs):
        share, trained = (epochs - 1 - epoch) / epochs, epoch - self.args.frozen_epochs
        if trained >= 0:                        # the decay is published for stages of 25 epochs
            share = math.exp(-0.2 * trained * 25 / epochs)
        dropout = self.DROPOUT[self.stage] * share
        for module in self.network.modules():
            if isinstance(module, DroppedSkip):
                module.probability.fill_(dropout)
        return {'skip_dropout': dropout}

    def result(self):
        """Strike out the weakest skip of the normal cell and choose again, until two are left."""
        normal, reduce = self.network.choice_weights(self.args.seed)
        skip = list(self.network.space.operations).index('skip_connect')
        while True:
            genotype = derive(normal, reduce)
            edges, _ = cell_edges(genotype, 'normal', DARTS)
            skips = [EDGES.index(edge) for edge in edges if edges[edge] == ('skip_connect',)]
            if len(skips) <= 2:
                return genotype, {}
            normal[min(skips, key=normal[:, skip].__getitem__), skip] = 0


class Gdas(Darts):
    """GDAS (1910.04465): one operation per edge, by Gumbel's argmax, drawn in every forward pass.

    Its gradient is that of the softmax, whose temperature falls from 10 to 0.1. Operations and
    BatchNorm after pooling are DARTS's.
    """
    recipe = dict(epochs=250)
    recipe_on = {'darts': dict(layers=6, batch_size=256, weight_decay=5e-4, nesterov=True)}
    stochastic = one_path = True

    def begin_epoch(self, epoch, epochs):
        return self.set_tensors(temperature=10 - 9.9 * epoch / max(1, epochs - 1))

    def mix(self, cell_type, p):
        log_p = F.log_softmax(self.network.alphas[cell_type], 1)
        q = F.gumbel_softmax(log_p, self.temperature, hard=True)
        return Drawn(q, q.argmax(1).tolist())


class DartsMinus(Darts):
    """DARTS- (2009.01027): an auxiliary skip on every edge, outside the softmax; it fades."""
    extras = {'auxiliary_skip': skip_connect}

    def begin_epoch(self, epoch, epochs):
        return self.set_tensors(skip_weight=1 - epoch / epochs)

    def mix(self, cell_type, p):
        return torch.cat([p, self.skip_weight.expand(len(p), 1)], 1)


class BetaDarts(Darts):
    """Beta-DARTS (2203.01665): the alphas' loss gets lambda times the mean of logsumexp(alpha)."""
    recipe_on = {'nb201': dict(epochs=100, nesterov=False, weight_decay=3e-4)}

    def begin_epoch(self, epoch, epochs):
        return self.set_tensors(lambda_=50 * (epoch / epochs))

    def alpha_loss(self):
        cells = [self.network.alphas[cell_type] for cell_type in self.network.space.cell_types]
        return self.lambda_ * torch.cat(cells).logsumexp(1).mean()


class SDarts(Darts):
    """SDARTS (2002.05283): the weights are trained with probabilities moved within a radius.

    --perturb random: by a uniform shift, brought back to the simplex. adversarial: from there
    seven steps of 2 radius / 7 along the sign of the training loss's gradient, each brought back,
    in evaluation mode as by the authors. A shift that would lower the loss is left out.
    """
    recipe_on = {'nb201': dict(epochs=100, nesterov=False, weight_decay=3e-4)}
    flags = (*ALPHAS, 'perturb')
    near = None             # the perturbation, while the weights are trained

    def begin_epoch(self, epoch, epochs):
        return self.set_tensors(radius=0.03 + 0.27 * (epoch / epochs))

    def mix(self, cell_type, p):
        return p if self.near is None else self.near[cell_type]

    @contextmanager
    def weight_training(self, train):
        try:
            self.near = self.perturbation(train)
            yield
        finally:                                # a CUDA graph's capture may have failed
            self.near = None
            self.network.train()

    def perturbation(self, train):
        """{cell type: (edges, operations)} to train the weights with."""
        network, radius = self.network, self.radius
        start = {cell: self.probabilities(network.alphas[cell]).detach()
                 for cell in network.space.cell_types}
        near = {cell: simplex(p + radius * (2 * torch.rand_like(p) - 1))
                for cell, p in start.items()}
        if self.args.perturb == 'random':
            return near
        start_alike(network)                    # running statistics, which the first process saves
        network.eval()
        with require_grads(network):
            before, _ = forward(network, train, self.args.amp)
            self.near = near                    # the loop replaces its values
            for _ in range(7):
                grads, *_ = gradients(self, train, [p.requires_grad_() for p in near.values()])
                for cell, grad in zip(near, grads):
                    shift = near[cell].detach() + 2 * radius / 7 * grad.sign() - start[cell]
                    near[cell] = simplex(start[cell] + shift.clamp(-radius, radius))
            after, _ = forward(network, train, self.args.amp)
        network.train()
        before, after = average([before, after])
        return {cell: torch.where(after >= before, p, start[cell]) for cell, p in near.items()}


class RandomCell(Darts):
    """No search (a control): uniform over cells, without data."""
    searches, trains, flags = False, False, ()


class OneShot(Darts):
    """One-shot (SPOS, 1904.00420): each step trains one random cell, then all cells are scored.

    The scores are loss and accuracy, with the batch's statistics, on two fixed batches, of held-out
    and of training images (with --fresh of the first epoch); and the angle by which training turned
    the weights on the cell's paths (after RLNAS, 2101.11834).
    """
    # Chosen on real labels. Losses on few images that are seen often rank cells well; losses on
    # held-out ones rank them the wrong way round (tests/README.md).
    recipe_on = {'laptop': dict(init_channels=8, epochs=259, steps_per_epoch=31, augment='none',
                                learning_rate=0.1, train_portion=2000.0, score='train_loss',
                                least_batches=2)}
    stochastic = one_path = True
    scores = 'valid_loss', 'train_loss', 'valid_accuracy', 'angle'
    flags = 'candidates', 'score'
    first_three = memos = None  # operations on edges into nodes 1 and 2, and memos of the halves
    cell = choices = None       # of the cell taken: {cell type: columns}, [(type, edge, operation)]

    def mix(self, cell_type, p):
        return Drawn(None, self.cell[cell_type])

    def weight_training(self, train):
        self.take(random_cell(self.args.space, int(torch.randint(2 ** 62, ()))))
        return nullcontext()

    def take(self, genotype):
        """Compute this cell from now on."""
        space = self.network.space
        names, self.cell, self.choices = list(space.operations), {}, []
        for cell_type in space.cell_types:
            edges, _ = cell_edges(genotype, cell_type, space)
            chosen = [edges.get(edge, ('none',)) for edge in space.edges]
            self.cell[cell_type] = [names.index(name) for name, in chosen]
            self.choices += [(cell_type, edge, name) for edge, (name,) in edges.items()]

    def fixed_batch(self, batches, count):
        """(x, y): up to `count` images from all over a half, as they are; always the same ones."""
        rows = batches.indices[evenly(len(batches.indices), count)]
        fixed = Batches(batches.data, rows, len(rows), self.device, shuffle=False, workers=0)
        fixed.indices = rows                    # each process has all of them
        return next(fixed.epoch())

    def prepare(self):
        """Set what `measure` needs for all cells: two fixed batches, and products of weights."""
        self.first_three = None                 # maps of other weights
        self.halves = [self.fixed_batch(half, 128) for half in self.batches]
        trained = self.network
        torch.manual_seed(self.args.seed)       # so that build draws the first network again
        before = weights_by_operation(self.build())
        self.network, self.products = trained, {}
        for key, weights in weights_by_operation(trained).items():
            a, b = before[key].double(), weights.double()
            self.products[key] = torch.stack([a @ b, a @ a, b @ b]).tolist()

    @torch.no_grad()
    def measure(self, genotype):
        """{score: number} of the cell that is taken."""
        out, first_three = {}, [columns[:3] for columns in self.cell.values()]
        if first_three != self.first_three:
            self.first_three, self.memos = first_three, [{}, {}]
        for half, batch, memo in zip(('train', 'valid'), self.halves, self.memos):
            self.network.memo = memo if self.args.space == 'nb201' else None
            loss, right = forward(self.network, batch, self.args.amp)
            out[f'{half}_loss'], out[f'{half}_accuracy'] = loss.item(), right.item() / len(batch[1])
        on_paths = expression(genotype)[1] if isinstance(genotype, str) else EDGES
        sums = np.zeros(3)
        for key in self.choices:
            if key[1] in on_paths and key in self.products:
                sums += self.products[key]
        out['angle'] = math.acos(min(1, sums[0] / math.sqrt(sums[1] * sums[2]))) if sums[1] else 0.
        return out

    def candidates(self):
        """The genotypes to score: all of nb201 that differ, or some, drawn by seed."""
        count, seed = self.args.candidates, self.args.seed
        if self.args.space == 'darts':
            return [random_cell('darts', [seed, k]) for k in range(count or 1000)]
        cells = distinct_cells()
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(cells))
        return cells if count is None else [cells[k] for k in order[:count]]

    def score(self, cells):
        """[{cell_params: weights of its operations, score: mean over --repeats}] of genotypes."""
        (rank, processes), rows = world(), {}
        sizes = {key: len(weights) for key, weights in weights_by_operation(self.network).items()}
        repeats = 1 if self.trains else self.args.repeats
        progress = Progress(repeats * len(cells), 'scores', hint='')
        self.network.train()
        for repeat in range(repeats):
            if repeat:
                self.build()
            self.prepare()
            # Sorted, so that cells that begin alike follow each other and share maps (memo).
            mine = sorted(range(rank, len(cells), processes), key=cells.__getitem__)
            for done, k in enumerate(mine, 1):
                self.take(cells[k])
                size = sum(sizes.get(key, 0) for key in self.choices)
                row = rows.setdefault(k, {'cell_params': size})
                with self.network.frozen_statistics():
                    found = self.measure(cells[k])
                for name, value in found.items():
                    row[name] = row.get(name, 0) + value / repeats
                progress.update(repeat * len(cells) + done * processes)
        progress.close()
        for part in gather(rows):
            rows.update(part)
        return [rows[k] for k in range(len(cells))]

    def result(self):
        """Write scores.csv, and take the best cell; of equal ones the seed draws."""
        cells, args = self.candidates(), self.args
        rows, by = self.score(cells), self.scores[0]
        if self.trains and args.score != 'auto':
            by = args.score
        elif self.trains and self.batches[0].data.kind not in ('real', 'generated'):
            by = 'train_loss'                   # held-out labels that are random teach nothing
        values = np.array([row[by] for row in rows]) * (-1 if by.endswith('loss') else 1)
        draws = np.random.Generator(np.random.Philox(args.seed)).random(len(cells))
        best = np.lexsort((draws, np.nan_to_num(values, nan=-np.inf)))[-1]
        lines = [['genotype', *rows[0], 'cifar10']]
        for cell, row in zip(cells, rows):
            known = truth(cell) if isinstance(cell, str) else {}
            lines.append([cell if known else to_json(cell), *row.values(), known.get('cifar10')])
        if is_first():
            write_csv(Path(args.save, 'scores.csv'), lines)
        return cells[best], {'score': by, 'cells': len(cells)}


class NasWot(OneShot):
    """NASWOT (2006.04647): log |det| of the kernel of a batch's ReLU patterns, untrained.

    The kernel counts for two images the activations that are both on or both off, over all ReLUs.
    """
    recipe = dict(batch_size=128)
    recipe_on = {'laptop': dict(init_channels=8, repeats=1), 'imagenet': recipe}
    trains, scores, flags = False, ('naswot',), ('candidates', 'repeats')

    def prepare(self):
        x, _ = self.fixed_batch(self.batches[0], self.args.batch_size)
        _, first = np.unique(x.flatten(1).cpu().numpy(), axis=0, return_index=True)
        self.x = x[np.sort(first)]              # two equal images would make the determinant 0
        for module in self.network.modules():
            if isinstance(module, (nn.ReLU, ReLUConvBN, SepConv, DilConv, FactorizedReduce)):
                module.register_forward_hook(self.add)
            if isinstance(module, SepConv):
                module.norm1.register_forward_hook(self.add)

    def add(self, module, given, out):
        """Add a ReLU to the kernel, as a hook; a state is computed once for all its edges."""
        x = out if torch.is_tensor(given[0]) else given[0].state       # of Inputs
        if self.last is not x:
            on = (x > 0).flatten(1).float()
            ones = on.sum(1)
            self.part = 2 * (on @ on.T) + on.shape[1] - ones - ones.unsqueeze(1)
        self.last, self.kernel = x, self.kernel + self.part

    @torch.no_grad()
    def measure(self, genotype):
        self.kernel, self.last = 0, None
        self.network(self.x)
        return {'naswot': torch.linalg.slogdet(self.kernel.double().cpu())[1].item()}


class Snip(NasWot):
    """SNIP (1810.02340): sum of |weight x gradient of the loss| on a batch, untrained."""
    scores = ('snip',)

    def prepare(self):
        self.batch = self.fixed_batch(self.batches[0], self.args.batch_size)

    def measure(self, genotype):
        return {'snip': self.saliency(forward(self.network, self.batch)[0])}

    def saliency(self, loss):
        weights = [p for p in self.network.weights if p.dim() > 1]
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        return sum((w * g).abs().sum().item() for w, g in zip(weights, grads) if g is not None)


class SynFlow(Snip):
    """SynFlow (2006.05467): as SNIP, of the summed output for an image of ones, with |weights|.

    It sees no data. BatchNorm is left out, as in zero-cost NAS (2101.08134).
    """
    scores = ('synflow',)

    def prepare(self):
        network, size = self.network.double().eval(), self.batches[0].data.image_size
        self.x = torch.ones(1, 3, size, size, dtype=torch.float64, device=self.device)
        for weight in network.weights:
            weight.data.abs_()
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.forward = lambda x, scale=None: x

    def measure(self, genotype):
        return {'synflow': self.saliency(self.network(self.x).sum())}


METHODS = {'darts': Darts, 'pcdarts': PcDarts, 'pdarts': PDarts, 'gdas': Gdas, 'sdarts': SDarts,
           'dartsminus': DartsMinus, 'betadarts': BetaDarts, 'oneshot': OneShot, 'naswot': NasWot,
           'snip': Snip, 'synflow': SynFlow, 'random': RandomCell}


def weights_by_operation(network):
    """{(cell type, edge, operation): its weights, flat, of all cells} of a one-path supernet."""
    parts = {}
    for cell, cell_type in zip(network.cells, network.cell_types):
        if cell_type is None:                   # a ResidualBlock
            continue
        for mixed_op, leaving in zip(cell.mixed_ops, cell.leaving):
            for (edge, _), block in zip(mixed_op.spans, mixed_op.blocks.values()):
                for name, operation in block.items():
                    flat = [p.detach().flatten() for p in operation.parameters()]
                    parts.setdefault((cell_type, leaving[edge], name), []).extend(flat)
    return {key: torch.cat(flat) for key, flat in parts.items() if flat}


def simplex(p):
    """Rows clamped to [0, 1] and divided by their sum; one-hot if nothing is left."""
    kept = p.clamp(0, 1)
    total = kept.sum(1, keepdim=True)
    best = F.one_hot(p.argmax(1), p.shape[1]).to(p.dtype)
    return torch.where(total > 0, kept / total.clamp_min(1e-30), best)


# ---- The bilevel step -----------------------------------------------------------------------


@contextmanager
def require_grads(network, wanted=()):
    """Inside, gradients reach these parameters only: no work is done for the others."""
    parameters = network.weights + network.architecture_parameters()
    for p in parameters:
        p.requires_grad_(False)
    for p in wanted:
        p.requires_grad_()
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_()


def forward(network, batch, amp=False):
    """(loss, right answers) of a batch, a tensor each."""
    x, y = batch
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
        logits = network(x)
    logits = logits.float() if amp else logits
    return loss_of(logits, y), correct(logits.detach(), y)


def gradients(method, batch, wanted, exact=False):
    """(gradients of the loss of a batch, loss, right answers).

    The batch is computed in --grad_accum parts, and gradients are averaged over all processes;
    loss and right answers are of this process. exact: without autocast.
    """
    network, args = method.network, method.args
    parts = list(zip(*(t.chunk(args.grad_accum) for t in batch)))
    total, sums = None, 0
    for part in parts:
        loss, right = forward(network, part, args.amp and not exact)
        loss = loss / len(parts)
        grads = torch.autograd.grad(loss, wanted, materialize_grads=method.one_path)
        sums = sums + torch.stack([loss.detach(), right])
        total = list(grads) if total is None else torch._foreach_add(total, grads)
        del loss, grads                         # lets go of what the graph held
    return average(total), *sums.unbind()


def first_order(method, valid):
    """(gradients of the alphas, loss, right answers) on valid at these weights (equation 6)."""
    network = method.network
    alphas = network.architecture_parameters()
    with require_grads(network, alphas), network.frozen_statistics():
        return gradients(method, valid, alphas)


def second_order(method, train, valid, sgd):
    """Gradients of the alphas through one virtual step of the weights (DARTS, equations 7, 8).

    The virtual step w' = w - eta (gradient + weight decay + momentum) is that of sgd without
    clipping, in place. Returns (gradients, loss, right answers) at w' on the validation batch.
    """
    network = method.network
    weights, alphas = network.weights, network.architecture_parameters()
    group = sgd.param_groups[0]
    eta, values = group['lr'], [w.data for w in weights]
    with network.frozen_statistics():
        with require_grads(network, weights):
            step, *_ = gradients(method, train, weights)
        before = [v.clone() for v in values]
        decayed = step = torch._foreach_add(step, before, alpha=group['weight_decay'])
        if sgd.state:
            buffers = [sgd.state[w]['momentum_buffer'] for w in weights]
            step = torch._foreach_add(step, buffers, alpha=group['momentum'])
        if group['nesterov']:
            step = torch._foreach_add(torch._foreach_mul(step, group['momentum']), decayed)
        torch._foreach_mul_(step, -eta)
        torch._foreach_add_(values, step)
        grads, loss, right = gradients(method, valid, weights + alphas)
        dw, dalpha = grads[:len(weights)], grads[len(weights):]
        # Equation 8 by finite differences along dw; none where dw is zero or not finite. The two
        # losses differ in their last digits only, so neither autocast nor TF32 may round them.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dw)))
        sound = (norm > 0) & norm.isfinite()
        eps = torch.where(sound, 0.01 / norm, 1.0)
        dw = [torch.where(sound, d * eps, 0.0) for d in dw]
        set_tf32(False)
        sides = []
        for sign in (1, -1):
            torch._foreach_copy_(values, before)
            torch._foreach_add_(values, dw, alpha=sign)
            with require_grads(network, alphas):
                sides.append(gradients(method, train, alphas, exact=True)[0])
        set_tf32(method.args.tf32)
        torch._foreach_copy_(values, before)
    return [a - eta * (p - n) / (2 * eps) for a, p, n in zip(dalpha, *sides)], loss, right


def architecture_step(method, train, valid, sgd, adam):
    """Step the alphas; return (loss, right answers) on valid before it."""
    alphas, args = method.network.architecture_parameters(), method.args
    if args.arch_data == 'none':                # control: no images, only the method's own terms
        loss = right = torch.zeros((), device=alphas[0].device)
        grads = [torch.zeros_like(alpha) for alpha in alphas]
    elif args.unrolled:
        grads, loss, right = second_order(method, train, valid, sgd)
    else:
        grads, loss, right = first_order(method, valid)
    more = method.alpha_loss()
    if more is not None:
        more = torch.autograd.grad(more, alphas, materialize_grads=True)
        grads = torch._foreach_add(grads, more)
    for alpha, grad in zip(alphas, grads):
        alpha.grad = grad
    if args.arch_grad_clip:
        torch.nn.utils.clip_grad_norm_(alphas, args.arch_grad_clip, foreach=True)
    adam.step()
    adam.zero_grad()
    return loss, right


def weight_step(method, train, sgd):
    """Step the weights; returns (loss, right answers) on the training batch before it."""
    network = method.network
    weights = network.weights
    with method.weight_training(train), require_grads(network, weights):
        grads, loss, right = gradients(method, train, weights)
    for weight, grad in zip(weights, grads):    # the fused step takes the weights' layout only
        if grad.dim() == 4:
            grad = grad.contiguous(memory_format=torch.channels_last)
        weight.grad = grad
    if method.args.grad_clip:
        torch.nn.utils.clip_grad_norm_(weights, method.args.grad_clip, foreach=True)
    sgd.step()
    sgd.zero_grad()
    return loss, right


def bilevel_step(method, train, valid, sgd, adam, frozen=False):
    """Step the alphas, unless `frozen`, then the weights: (4,), loss and right of each batch."""
    parts = () if frozen else architecture_step(method, train, valid, sgd, adam)
    sums = torch.stack([*weight_step(method, train, sgd), *parts])
    return torch.cat([sums, torch.zeros_like(sums)]) if frozen else sums


def optimizers(network, args):
    """SGD for the weights, and Adam for the alphas and for nothing else."""
    cuda = next(network.parameters()).is_cuda
    sgd = make_optimizer(network.weights, args)
    adam = torch.optim.Adam(network.architecture_parameters(), args.arch_learning_rate,
                            betas=(0.5, 0.999), weight_decay=args.arch_weight_decay,
                            foreach=True, capturable=cuda)
    return sgd, adam


# ---- What the log says of the alphas --------------------------------------------------------


def describe(network, seed):
    """What log.jsonl says of the alphas after an epoch.

    By cell type: entropy in nats, mean over edges, and skips of the genotype.
    """
    genotype, line = network.genotype(seed), {}
    for cell_type in network.space.cell_types:
        p = network.softmax(network.alphas[cell_type]).detach().double().cpu()
        cell = getattr(genotype, cell_type, genotype)       # a string is one cell
        line[f'entropy_{cell_type}'] = -torch.xlogy(p, p).sum(1).mean().item()
        line[f'skips_{cell_type}'] = str(cell).count('skip_connect')
    if isinstance(genotype, str):
        line['truth_for_analysis_only'] = truth(genotype)
    alphas = {name: alpha.detach().cpu().tolist() for name, alpha in network.alphas.items()}
    return {**line, 'genotype': plain(genotype), 'alphas': alphas}


def largest_eigenvalue(network, valid, args, iterations=20):
    """Of the alphas' Hessian, weight decay added, by Lanczos's method (RobustDARTS).

    The loss is that of the first of --grad_accum parts of a batch.
    """
    alphas, valid = network.architecture_parameters(), [t.chunk(args.grad_accum)[0] for t in valid]
    set_tf32(False)
    with require_grads(network, alphas), network.frozen_statistics():
        loss, _ = forward(network, valid)
        grads = torch.autograd.grad(loss, alphas, create_graph=True)
        flat = torch.cat([g.flatten() for g in grads])
        v = torch.randn(len(flat), generator=torch.Generator().manual_seed(0)).to(flat)
        basis, diagonal, off_diagonal = [v / v.norm()], [], []
        for _ in range(iterations):
            product = torch.autograd.grad(flat @ basis[-1], alphas, retain_graph=True)
            w = torch.cat([p.flatten() for p in average(product)])
            diagonal.append((w @ basis[-1]).item())
            for other in basis * 2:                     # twice, as rounding demands
                w = w - (w @ other) * other
            off_diagonal.append(w.norm().item())
            if off_diagonal[-1] <= 1e-6 * max(map(abs, diagonal)):
                break
            basis.append(w / off_diagonal[-1])
    set_tf32(args.tf32)
    diagonal, off_diagonal = torch.tensor([diagonal, off_diagonal], dtype=torch.float64)
    matrix = torch.diag(diagonal) + torch.diag(off_diagonal[:-1], -1)   # its lower half is read
    return torch.linalg.eigvalsh(matrix)[-1].item() + args.arch_weight_decay


def before_growth(log, epochs):
    """RobustDARTS: the line whose genotype to take, once the eigenvalue has grown, or None.

    The mean of five values must exceed 1.3 times the mean four values earlier, which must be
    positive and not before epoch 10 of 50.
    """
    known = [line for line in log if line.get('eigenvalue') is not None]
    for k in range(8, len(known)):
        values = [line['eigenvalue'] for line in known[k - 8:k + 1]]
        earlier = known[k - 6]                          # in the middle of the first five
        if earlier['epoch'] >= 10 * epochs / 50 and sum(values[4:]) > 1.3 * sum(values[:5]) > 0:
            return earlier
    return None


# ---- The search -----------------------------------------------------------------------------


def parse(argv):
    """Settings as a namespace: typed, over --quick, preset, method, space, and DARTS's."""
    def defaults_for(typed, chosen, preset):
        method = METHODS[chosen['method']]
        space = {**chosen, **PRESETS[preset], **typed}['space']
        # The later ones win.
        out = {**COMMON, **SPACES[space], **method.recipe, **method.recipe_on.get(space, {}),
               **PRESETS[preset], **method.recipe_on.get(preset, {})}
        if preset == 'laptop' and space == 'darts':
            out.update(init_channels=8, layers=5, batch_size=32)
        if chosen['early_stop']:
            out['hessian'] = 2
        if 'train_portion' in PRESETS[preset] and has_own_images(chosen['data']):
            out.update(train_portion=0.8, valid_fraction=0.2)       # larger, of fewer images
        if chosen['quick']:
            out.update(QUICK, num_classes=min(out.get('num_classes', 10), 20))
        return out

    table = {'method': Setting('darts', 'how to search', list(METHODS)), **SEARCH}
    data = {**INPUT, 'data': INPUT['data']._replace(default='noise')}
    epochs = Setting(50, 'passes over the data; 0: untrained alphas', number(int, 0))
    tables = {'method': table, 'data': data, 'schedule': {**SCHEDULE, 'epochs': epochs}}
    args, typed = settle(__doc__, tables, argv, PRESETS, defaults_for)
    method = METHODS[args.method]
    if args.space not in method.spaces:
        raise UserError(f'--method {args.method} is not for --space {args.space}: take another, or '
                        '--space darts')
    idle = set().union(*[other.flags for other in METHODS.values()]) - {*method.flags}
    idle.add('layers' if args.space == 'nb201' else 'cells_per_stage')
    if args.arch_data != 'valid' or not method.trains:
        idle.add('valid_fraction')
    if method.stochastic or args.arch_data == 'none':   # two losses cannot be compared, or are 0
        idle |= {'unrolled', 'hessian', 'early_stop'}
    if not method.trains:
        idle |= SCHEDULE.keys() - {'batch_size'} | {'augment', 'amp'}
    refuse_idle(typed, idle, f'for --method {args.method} beside the other flags')
    least = max(method.stages, method.stages * max(args.frozen_epochs, args.warmup_epochs) + 1)
    if 0 < args.epochs < least:
        raise UserError(f'--epochs {args.epochs}: give {least} or more, for its stages, '
                        '--frozen_epochs and --warmup_epochs')
    if args.early_stop and (math.ceil(args.epochs / args.hessian)
                            - math.ceil(args.frozen_epochs / args.hessian)) < 9:
        raise UserError('--early_stop needs nine eigenvalues: give more --epochs, or --hessian 1')
    if args.init_channels % args.partial:
        raise UserError(f'--init_channels must be a multiple of --partial {args.partial}')
    args.save = args.save or run_name('search', [args.data, args.method], args, typed)
    return args


def has_own_images(name):
    """Whether data are unreal images, not real ones with other labels."""
    if Path(name, 'meta.json').exists():
        name = read_json(Path(name, 'meta.json')).get('kind')
    return name in KINDS and 'source' not in KINDS[name].settings.split()


def two_parts(data, args):
    """Disjoint images for the weights, int (n,), and the alphas, (m,); no patient is in both."""
    share = args.valid_fraction if args.arch_data == 'valid' else None
    portion = args.train_portion                # above 1: how many images, a half at most
    if portion > 1:
        portion = min(0.5, portion / len(data))
    if portion + (share or 0) > 1 + 1e-9:
        raise UserError('--train_portion and --valid_fraction are more than all images: take less')
    first, rest = data.split(np.arange(len(data)), portion, args.seed)
    if share is None or portion >= 1:
        return first, rest
    return first, data.split(rest, min(1.0, share / (1 - portion)), args.seed)[0]


def make_batches(data, args, device):
    """[Batches for the weights] and, if they are to be held out, others for the alphas."""
    halves = two_parts(data, args)[:2 if args.arch_data == 'valid' else 1]
    augment, size = args.augment, batch_of(args, min(map(len, halves)))
    if augment == 'auto':                       # no colour jitter: PC-DARTS searches without
        augment = auto_augment(data).replace('imagenet', 'crop')
    return [Batches(data, half, size, device, augment, seed=2 * args.seed + k,
                    workers=args.workers) for k, half in enumerate(halves)]


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = choose_device(args.gpu, args.tf32)
    run = Run(args, device, 'genotype.json')
    if run.finished:                            # a loop goes on without reading the data
        say(args, find_genotype(str(run.folder))[0])
        return
    if not METHODS[args.method].searches:
        with run.on(None):
            finish(run, args, random_cell(args.space, args.seed))
        return

    data = find_or_make(args.data, vars(args))
    stem = stem_for(args.stem, data.image_size)
    batches = make_batches(data, args, device)
    run.plan(len(batches[0]))
    method = METHODS[args.method](args, len(data.classes), stem, device, batches)
    if not method.trains:
        run.epochs = run.total = 0
    stage_starts = [k * run.epochs // method.stages for k in range(method.stages + 1)]

    with run.on(data):
        torch.manual_seed(args.seed)
        method.stage = run.checkpoint.get('stage', 0)
        method.kept = run.checkpoint.get('kept')
        network = method.build()
        sgd, adam = optimizers(network, args)
        parts = [f'{len(half.indices):,}' for half in batches]  # for the weights, for the alphas
        run.start(f'{method_name(vars(args))} on {data.name} ({" + ".join(parts)} of '
                  f'{len(data):,} images, {data.image_size} px, {len(data.classes)} classes, '
                  f'batch {batches[0].batch_size})',
                  torch.zeros(4, device=device),        # what bilevel_step returns
                  dict(network=network, sgd=sgd, adam=adam),
                  lambda: dict(stage=method.stage, kept=method.kept))

        def step(is_frozen, *batch):
            # Images and labels for the weights, then for the alphas; one stream is for both.
            return bilevel_step(method, batch[:2], batch[-2:], sgd, adam, is_frozen)

        use_graph = args.graph == 'auto' and num_processes() == 1 and not method.one_path
        steps = {}                              # {(whether the alphas are frozen, ...): step}
        for epoch in range(run.epoch, run.epochs):
            if args.early_stop and before_growth(run.log, run.epochs):
                break
            if epoch == stage_starts[method.stage + 1]:
                method.next_stage()             # P-DARTS: from new weights
                network = method.build()
                sgd, adam = optimizers(network, args)
                run.objects = dict(network=network, sgd=sgd, adam=adam)
            first, end = stage_starts[method.stage:method.stage + 2]
            past, length = epoch - first, end - first
            # A stage trains the alphas in its last epoch at least; methods with scores never do.
            is_frozen = past < min(args.frozen_epochs, length - 1) or bool(method.scores)
            numbers = method.begin_epoch(past, length)
            # A CUDA graph keeps plain values of the method, such as its stage, as they are now.
            plain_values = int, float, str, np.generic
            key = is_frozen, *(v for v in vars(method).values() if isinstance(v, plain_values))
            if key not in steps:                # a CUDA graph holds the memory of a step: keep one
                changed = partial(tensors_of_a_step, network, sgd, adam)
                steps = {key: GraphedStep(partial(step, is_frozen), changed, device, use_graph)}
            learning_rate = learning_rate_at(args, past, length)
            sgd.param_groups[0]['lr'].fill_(learning_rate)
            streams = [endless(b, epoch, run) for b in batches[:1 if is_frozen else 2]]
            draws = (sum(pair, ()) for pair in zip(*streams))   # (x, y, x, y), or (x, y)
            run.train(epoch, draws, steps[key])
            start_alike(network)                # also if processes have GPUs of other kinds
            size, has_valid = batches[0].batch_size, not is_frozen and args.arch_data != 'none'
            loss, right, valid_loss, valid_right = average([run.sums])[0].div(run.steps).tolist()
            images = size / num_processes()     # of each process
            line = {'steps': run.steps, 'learning_rate': learning_rate, **numbers,
                    'train_loss': loss, 'train_accuracy': right / images,
                    'valid_loss': valid_loss if has_valid else None,
                    'valid_accuracy': valid_right / images if has_valid else None}
            if data.multilabel:                 # zeros for all labels are right nearly always
                line['train_accuracy'] = line['valid_accuracy'] = None
            if not method.scores:
                line.update(describe(network, args.seed))
            if args.hessian and not is_frozen and epoch % args.hessian == 0:
                line['eigenvalue'] = largest_eigenvalue(network, run.batch[-2:], args)
            run.end_epoch(epoch, line, len(streams) * run.steps * size)
        began = time.time()
        genotype, notes = method.result()
        if method.scores:
            run.log.append({'epoch': run.epochs, 'cells': notes['cells'],
                            'seconds': round(time.time() - began, 3),
                            'peak_memory_mib': peak_memory_mib(device)})
            run.write_log()
        stop = args.early_stop and before_growth(run.log, run.epochs)
        if stop:
            genotype, notes['early_stop'] = from_plain(stop['genotype']), stop['epoch']
        finish(run, args, genotype, **notes)


def finish(run, args, genotype, **notes):
    """Write genotype.svg and genotype.json, and say what came out and what comes next."""
    if not is_first():
        return
    method = METHODS[args.method]
    data = data_name(vars(args)) if method.searches else None
    arch_data = args.arch_data if method.searches and not method.scores else None
    write_file(run.folder / 'genotype.svg', draw(genotype, run.folder.name))
    write_file(run.folder / 'genotype.json', to_json(
        genotype, data=data, method=method_name(vars(args)), seed=args.seed, arch_data=arch_data,
        **notes) + '\n')
    if 'score' in notes:
        print(f'the best of {notes["cells"]:,} cells, by {notes["score"]}:')
    say(args, genotype)


def say(args, genotype):
    """Print the cells that were found, what is known of them, and the next command."""
    print(genotype)                             # as DARTS's code writes it
    if isinstance(genotype, str):
        names, better = dict(zip(NB201.edges, from_string(genotype))), 'NB201_LARGEST'
        on_paths = str([names[edge] for edge in expression(genotype)[1]])
        print('true accuracy of this cell: CIFAR-10 {cifar10:.2f}%, better than '
              '{percentile:.1f}% of all cells, CIFAR-100 {cifar100:.2f}%, ImageNet16-120 '
              '{imagenet16:.2f}%'.format(**truth(genotype)))
    else:
        on_paths, better = str(genotype.normal), 'PC_DARTS_cifar'
    arch = args.save
    if 'conv' not in on_paths:
        print(f'the search has collapsed, this cell has no convolution: better retrain {better}')
        arch = better
    if args.quick:
        print('this was --quick: the pipeline works, the genotype means nothing')
    print('next:', next_command(args, arch))


def next_command(args, arch):
    """The command that retrains `arch` on the real data that the search was for."""
    target, made, where = args.data, vars(args), []
    if Path(target, 'meta.json').exists():
        about = read_json(Path(target, 'meta.json'))
        target, made = about['kind'], {**about['settings'], 'image_size': about['image_size']}
    if target in KINDS:
        has_source = 'source' in kind_of(target, made).settings.split()
        target = args.preset if args.preset in REAL else 'cifar10'
        if made.get('multilabel'):
            target = 'chexpert'
        if has_source and not Path(made['source'], 'meta.json').exists():   # a real source
            target = made['source']
        elif not has_source and target not in CIFAR and 'data_dir' not in args.typed:
            where = ['--data_dir', 'DIR']           # nobody has said where these images are
    script = os.path.relpath(Path(__file__).with_name('retrain.py'))
    words, usual = ['python', script, '--arch', arch, '--data', target, *where], DEFAULTS
    if args.quick:
        words.append('--quick')
    elif args.preset == 'laptop':
        words += ['--preset', 'laptop']
        usual = {**usual, **PRESETS['laptop']}
    elif target in CIFAR and args.space == 'darts':
        words += ['--auxiliary', '--cutout']
    inner, folder = CIFAR.get(target, [None])[0], Path(args.data_dir)
    if inner and folder.name != inner and not (folder / inner).is_dir():
        words.append('--download')
    names = ['image_size', 'test_fraction', 'skip_broken']
    if target in REAL:
        names = ['data_dir', 'uncertain', 'views']
    for name in names:
        value = made.get(name, getattr(args, name))
        if value != usual[name]:
            words += [f'--{name}'] if value is True else [f'--{name}', str(value)]
    if args.gpu != RUN['gpu'].default:
        words += ['--gpu', str(args.gpu)]
    return shlex.join(words)


if __name__ == '__main__':
    leave(main())
