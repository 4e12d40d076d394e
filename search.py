"""Search a cell on unreal or real data: bilevel, differentiable, ending in a genotype.

    python search.py --data noise --gpu 0                          # DARTS, first order, 50 epochs
    python search.py --data noise --method pcdarts --gpu 0
    python search.py --data random_labels --unrolled --gpu 0       # second order
    python search.py --data cifar10 --space nb201 --method gdas --gpu 0
    python search.py --data noise --preset laptop                 # minutes on a CPU, and the truth
    python search.py --data noise --quick                          # a minute on a CPU, meaningless
    python search.py --data imagenet --data_dir DIR --method pcdarts --gpu 0     # 224 px
    python search.py --data chexpert --data_dir DIR --gpu 0
    torchrun --nproc_per_node 8 search.py --data imagenet --data_dir DIR --method pcdarts --resume
    for s in 0 1 2 3; do python search.py --data noise --seed $s --gpu 0 --resume; done

The last line can be stopped and started again at will: --resume goes on from the last checkpoint,
starts a run that has none and skips one that is done. Missing unreal data are made first. What the
methods differ in: DEFAULTS, strength_at, and the functions that say their name.
Sources: DARTS (arXiv 1806.09055), PC-DARTS (1907.05737), P-DARTS (1904.12760), GDAS (1910.04465),
SDARTS (2002.05283), DARTS- (2009.01027), beta-DARTS (2203.01665), RobustDARTS (1909.09656).
"""
import math
import shlex
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from evaluate import (GraphedStep, Running, add_run_flags, averaged, changed_by_a_step, check_alike,
                      check_schedule, correct, finished, gathered, learning_rate_at, load_states,
                      loss_of, method_of, open_run, own_sums, peak_memory_mib, preset_of,
                      random_states, read_log, run_name, shortened, start_alike, stem_of, write_log)
from generate_data import (REAL, USED, Batches, Parser, Progress, UserError, choose_device,
                           find_or_make, number, one_line_errors, read_meta, save_file,
                           set_tf32, stratified_split, world, write_file)
from genotypes import (agreement, draw, from_plain, from_string, plain, random_genotype,
                       random_string, to_json, truth)
from model_search import DARTS, NB201, Network, derive
from operations import DroppedSkip, dropped_skip

import torch
import torch.nn.functional as F

# Published settings by method. Frozen epochs are those at the start in which only weights train;
# of P-DARTS, at the start of each of its three stages, for which epochs are taken together.
COMMON = dict(epochs=50, batch_size=64, learning_rate=0.025, learning_rate_min=0.001,
              arch_learning_rate=3e-4, frozen_epochs=0, partial=1)
DEFAULTS = {
    'darts': COMMON,
    'pcdarts': dict(COMMON, batch_size=256, learning_rate=0.1, learning_rate_min=0.0,
                    arch_learning_rate=6e-4, frozen_epochs=15, partial=4),
    'pdarts': dict(COMMON, epochs=75, batch_size=96, learning_rate_min=0.0,
                   arch_learning_rate=6e-4, frozen_epochs=10, layers=5),
    'gdas': dict(COMMON, epochs=250),
    'sdarts': COMMON,
    'dartsminus': COMMON,
    'betadarts': dict(COMMON, weight_decay=3e-4),
    'random': COMMON}
# Of P-DARTS's stages: cells more than in the first, operations an edge, dropout on skips.
STAGES = [(0, 8, 0.0), (6, 5, 0.4), (12, 3, 0.7)]
# NAS-Bench-201: the same defaults but these of its own searches.
SPACE = dict(nesterov=True, weight_decay=5e-4)
# Defaults of a target, over those of the method. ImageNet: as PC-DARTS searched on it (section
# 4.3 of its paper), of the images 10% for the weights and 2.5% for the alphas, the learning rate
# for 1,024 images. CheXpert: our own choice, 10% of the patients for each.
PRESETS = {
    'cifar': {},
    'imagenet': dict(image_size=224, num_classes=1000, num_images=128000, source='imagenet',
                     batch_size=1024, rate_for=1024, learning_rate=0.5, learning_rate_min=0.0,
                     warmup_epochs=5, arch_learning_rate=6e-3, frozen_epochs=35, partial=2,
                     train_portion=0.1, valid_fraction=0.025),
    'chexpert': dict(image_size=224, num_classes=14, num_images=20000, multilabel=True,
                     source='chexpert', train_portion=0.1, valid_fraction=0.1),
    # Our own: NAS-Bench-201 in minutes on two cores, for which the alphas must move faster.
    'laptop': dict(space='nb201', cells_per_stage=1, image_size=16, epochs=50, steps_per_epoch=20,
                   batch_size=64, arch_learning_rate=3e-3)}
# --quick: the whole pipeline within a minute on two cores; what it finds means nothing.
QUICK = dict(num_images=1000, layers=5, cells_per_stage=1, init_channels=8, batch_size=32,
             epochs=3, warmup_epochs=0, steps_per_epoch=4, frozen_epochs=0,
             arch_learning_rate=3e-3, train_portion=0.5, valid_fraction=None)


# ---------------------------------------------------------------------------------------------
# The bilevel step


@contextmanager
def trained(network, weights=False, alphas=False):
    """Gradients reach only what is named: no work is done for the others."""
    for p in network.weight_parameters():
        p.requires_grad_(weights)
    for p in network.architecture_parameters():
        p.requires_grad_(alphas)
    try:
        yield
    finally:
        for p in network.parameters():
            p.requires_grad_(True)


def forward(network, batch, amp=False):
    """(loss, right answers) of a batch, a tensor each."""
    x, y = batch
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
        logits = network(x)
    logits = logits.float() if amp else logits
    return loss_of(logits, y), correct(logits.detach(), y)


def gradients(network, batch, wanted, args, exact=False):
    """(gradients of the loss of a batch, loss, right answers).

    Over --grad_accum parts of it, one at a time, and over the batches of all processes; loss and
    right answers are of this process. exact: without autocast.
    """
    parts = list(zip(*(t.chunk(args.grad_accum) for t in batch)))
    total, sums = None, 0
    for part in parts:
        loss, right = forward(network, part, args.amp and not exact)
        # GDAS: not everything is drawn, or even nothing. The square, since the gradient of a plain
        # sum is one expanded number, which cannot be clipped in place.
        if network.drawn:
            grads = torch.autograd.grad(loss + 0 * wanted[0].square().sum(), wanted,
                                        allow_unused=True, materialize_grads=True)
        else:
            grads = torch.autograd.grad(loss, wanted)
        sums = sums + torch.stack([loss.detach() / len(parts), right])
        total = list(grads) if total is None else torch._foreach_add(total, grads)
        del loss, grads                         # lets go of what the graph held
    if len(parts) > 1:
        torch._foreach_div_(total, len(parts))
    return averaged(total), *sums.unbind()


def first_order(network, valid, args):
    """Gradients of the alphas with the weights as they are (DARTS, equation 6).

    Returns (gradients, loss, right answers) on the validation batch.
    """
    with trained(network, alphas=True), network.frozen_statistics():
        return gradients(network, valid, network.architecture_parameters(), args)


def second_order(network, train, valid, sgd, args):
    """Gradients of the alphas through one virtual step of the weights (DARTS, equations 7, 8).

    The virtual step w' = w - eta (gradient + weight decay + momentum) is that which sgd would
    take without clipping. The weights are moved in place and put back; there is no second network.
    Returns (gradients, loss, right answers) at w' on the validation batch.
    """
    weights, alphas = network.weight_parameters(), network.architecture_parameters()
    group = sgd.param_groups[0]
    eta, values = group['lr'], [w.data for w in weights]
    with network.frozen_statistics():
        with trained(network, weights=True):
            step, *_ = gradients(network, train, weights, args)
        before = [v.clone() for v in values]
        step = torch._foreach_add(step, before, alpha=group['weight_decay'])
        decayed = [t.clone() for t in step] if group['nesterov'] else None
        if sgd.state:
            buffers = [sgd.state[w]['momentum_buffer'] for w in weights]
            torch._foreach_add_(step, buffers, alpha=group['momentum'])
        if group['nesterov']:
            torch._foreach_mul_(step, group['momentum'])
            torch._foreach_add_(step, decayed)
        torch._foreach_mul_(step, -eta)
        torch._foreach_add_(values, step)
        grads, loss, right = gradients(network, valid, weights + alphas, args)
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
            with trained(network, alphas=True):
                sides.append(gradients(network, train, alphas, args, exact=True)[0])
        set_tf32(args.tf32)
        torch._foreach_copy_(values, before)
    return [a - eta * (p - n) / (2 * eps) for a, p, n in zip(dalpha, *sides)], loss, right


def architecture_step(network, train, valid, sgd, adam, args, moments=None):
    """Step the alphas; returns (loss, right answers) on the validation batch before it.

    moments: to each pair of tensors the gradient of an alpha, and its square, is added.
    """
    alphas = network.architecture_parameters()
    if args.arch_data == 'none':                # the control: only what a method adds by itself
        loss = right = torch.zeros((), device=alphas[0].device)
        grads = [torch.zeros_like(alpha) for alpha in alphas]
    elif args.unrolled:
        grads, loss, right = second_order(network, train, valid, sgd, args)
    else:
        grads, loss, right = first_order(network, valid, args)
    for pair, grad in zip(moments or (), grads):
        pair += torch.stack([grad, grad.square()])
    if args.method == 'betadarts':
        grads = [g + d for g, d in zip(grads, beta_decay(network))]
    if args.method == 'pdarts':
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        grads = [g * (5 / (norm + 1e-6)).clamp(max=1) for g in grads]
    for alpha, grad in zip(alphas, grads):
        alpha.grad = grad
    adam.step()
    adam.zero_grad()
    return loss, right


def weight_step(network, train, sgd, args):
    """Step the weights; returns (loss, right answers) on the training batch before it."""
    weights = network.weight_parameters()
    near = perturbed(network, train, args) if args.method == 'sdarts' else None
    change = network.change if near is None else (lambda kind, _: near[kind])
    with trained(network, weights=True), mixed_by(network, change):
        grads, loss, right = gradients(network, train, weights, args)
    for weight, grad in zip(weights, grads):    # the fused step takes the weights' layout only
        weight.grad = grad.contiguous(memory_format=torch.channels_last) if grad.dim() == 4 \
            else grad
    torch.nn.utils.clip_grad_norm_(weights, args.grad_clip, foreach=True)
    sgd.step()
    sgd.zero_grad()
    return loss, right


def bilevel_step(network, train, valid, sgd, adam, args, frozen=False, moments=None):
    """Step the alphas, unless `frozen`, then the weights.

    Returns (4,): loss and right answers on the training batch, the same on the validation batch.
    """
    parts = () if frozen else architecture_step(network, train, valid, sgd, adam, args, moments)
    sums = torch.stack([*weight_step(network, train, sgd, args), *parts])
    return torch.cat([sums, torch.zeros_like(sums)]) if frozen else sums


# ---------------------------------------------------------------------------------------------
# What each method adds


def strength_at(args, epoch, epochs, frozen):
    """What a method's own term goes by in an epoch; of P-DARTS, in an epoch of a stage."""
    done = epoch / epochs
    if args.method == 'gdas':
        return 10 - 9.9 * epoch / max(1, epochs - 1)            # temperature
    if args.method == 'sdarts':
        return 0.03 + 0.27 * done                               # largest perturbation
    if args.method == 'dartsminus':
        return 1 - done                                         # weight of the auxiliary skip
    if args.method == 'betadarts':
        return 50 * done                                        # weight of the decay
    if args.method == 'pdarts':                                 # share of the dropout on skips
        if epoch < frozen:
            return (epochs - 1 - epoch) / epochs
        return math.exp(-0.2 * (epoch - frozen) * 25 / epochs)  # published for stages of 25
    return 0.0


def gumbel_one_hot(network, kind, _):
    """GDAS: one operation an edge, by Gumbel's argmax; the gradient is that of the softmax.

    Returns (edges, operations): one-hot in value. Drawn anew in every forward pass.
    """
    log_p = F.log_softmax(network.alphas[kind], 1)
    gumbel = -torch.empty_like(log_p).exponential_().clamp_min(1e-30).log()
    q = F.softmax((log_p + gumbel) / network.strength, 1)
    one_hot = F.one_hot(q.argmax(1), q.shape[1]).to(q.dtype)
    return one_hot - q.detach() + q


def with_auxiliary_skip(network, kind, p):
    """DARTS-: an auxiliary skip on every edge, outside the softmax, weighted `strength`.

    Where the stride is 2 it is the same factorized reduction as that among the operations.
    """
    more = torch.zeros_like(p)
    more[:, list(network.space.operations).index('skip_connect')] = 1
    return p + network.strength * more


def beta_decay(network):
    """Beta-DARTS: gradients of strength x the mean over edges of logsumexp(alpha)."""
    alphas = network.architecture_parameters()
    rows = [network.alphas[kind].logsumexp(1) for kind in network.space.kinds]
    return torch.autograd.grad(network.strength * torch.cat(rows).mean(), alphas,
                               allow_unused=True, materialize_grads=True)


@contextmanager
def mixed_by(network, change):
    """Forward passes inside mix with change(kind, p) in place of the probabilities p."""
    before, network.change = network.change, change
    try:
        yield
    finally:
        network.change = before


def perturbed(network, train, args):
    """SDARTS: {kind: (edges, operations)}, near the probabilities, to train the weights with.

    --perturb random: a uniform shift within the strength eps, brought back to the simplex.
    adversarial: from there seven steps of 2 eps / 7 along the sign of the training loss's
    gradient, each kept within eps and brought back to the simplex; the probabilities themselves
    where the loss is then lower than with them. BatchNorm has batch statistics in it.
    """
    eps = network.strength
    start = {kind: network.probabilities(kind).detach() for kind in network.space.kinds}
    near = {kind: simplex(p + eps * (2 * torch.rand_like(p) - 1)) for kind, p in start.items()}
    if args.perturb == 'random':
        return near

    def loss_near():
        with torch.no_grad():
            return averaged([forward(network, train, args.amp)[0]])[0]

    with trained(network), network.frozen_statistics():
        before = loss_near()
        with mixed_by(network, lambda kind, _: near[kind]):
            for _ in range(7):
                for value in near.values():
                    value.requires_grad_()
                grads, *_ = gradients(network, train, list(near.values()), args)
                for (kind, value), grad in zip(list(near.items()), grads):
                    p, shift = start[kind], value.detach() + 2 * eps / 7 * grad.sign() - start[kind]
                    near[kind] = simplex(p + torch.minimum(torch.maximum(shift, -eps), eps))
            worse = loss_near() >= before
    return {kind: torch.where(worse, value, start[kind]) for kind, value in near.items()}


def simplex(p):
    """Rows clamped to [0, 1] and divided by their sum; where nothing is left, one-hot."""
    kept = p.clamp(0, 1)
    total = kept.sum(1, keepdim=True)
    best = F.one_hot(p.argmax(1), p.shape[1]).to(p.dtype)
    return torch.where(total > 0, kept / total.clamp_min(1e-30), best)


def strongest(network, count):
    """P-DARTS: {kind: the `count` strongest operations of each edge}, in the space's order."""
    names, kept = list(network.space.operations), {}
    for kind in network.space.kinds:
        p = network.probabilities(kind).detach().cpu()
        order = p.argsort(dim=1, descending=True, stable=True)
        rows = order[:, :count].sort(1).values.tolist()
        kept[kind] = [[names[k] for k in row] for row in rows]
    return kept


@torch.no_grad()
def restricted(network, most=2):
    """P-DARTS: the genotype with at most `most` skips in the normal cell.

    While there are more, the weakest of them is struck out, and operations and edges are chosen
    again.
    """
    p = {kind: network.probabilities(kind).cpu().clone() for kind in network.space.kinds}
    skip, edges = list(network.space.operations).index('skip_connect'), network.space.edges
    while True:
        genotype = derive(p['normal'], p['reduce'])
        skips = [edges.index((2 + k // 2, state)) for k, (op, state) in enumerate(genotype.normal)
                 if op == 'skip_connect']
        if len(skips) <= most:
            return genotype
        p['normal'][min(skips, key=lambda e: p['normal'][e, skip].item()), skip] = 0


# ---------------------------------------------------------------------------------------------
# The result


def describe(network, moments, steps, before):
    """What log.jsonl says of the alphas after an epoch; before: the line before, or None.

    By cell type: entropy in nats and the margin between the first and the second operation, means
    over edges; skips of the genotype, edges whose strongest operation is none; the signal of the
    architecture gradient: norm of its mean over the epoch's steps by norm of its deviation.
    """
    genotype, line = network.genotype(), {}
    for kind, (total, squares) in zip(network.space.kinds, moments):
        p = network.probabilities(kind).detach().double().cpu()
        first, second = p.sort(1, descending=True).values[:, :2].unbind(1)
        names = from_string(genotype) if isinstance(genotype, str) \
            else [op for op, _ in getattr(genotype, kind)]
        mean = total.double() / max(1, steps)
        deviation = (squares.double() / max(1, steps) - mean.square()).clamp(min=0).sqrt().norm()
        line.update({
            f'entropy_{kind}': -torch.xlogy(p, p).sum(1).mean().item(),
            f'margin_{kind}': (first - second).mean().item(),
            f'skips_{kind}': names.count('skip_connect'),
            f'none_{kind}': (p.argmax(1) == list(network.space.operations).index('none')).sum()
            .item(),
            f'signal_{kind}': (mean.norm() / deviation).item() if deviation else None})
    if before:
        line['agreement'] = agreement(genotype, from_plain(before['genotype']))
    if isinstance(genotype, str):
        line['truth_for_analysis_only'] = truth(genotype)
    alphas = {}
    for name, a in network.alphas.items():
        dropped = getattr(network, f'dropped_{name}', None)
        a = a if dropped is None else a.masked_fill(dropped, -1e9)      # P-DARTS: weight 0
        alphas[name] = a.detach().cpu().tolist()
    return {**line, 'genotype': plain(genotype), 'alphas': alphas}


def largest_eigenvalue(network, valid, args, iterations=20):
    """Of the Hessian of a batch's loss in the alphas, their weight decay on its diagonal.

    What RobustDARTS watches, by Lanczos's method, on the epoch's last batch for the alphas. Of it
    the first of the --grad_accum parts is taken.
    """
    alphas, valid = network.architecture_parameters(), [t.chunk(args.grad_accum)[0] for t in valid]
    set_tf32(False)
    with trained(network, alphas=True), network.frozen_statistics():
        loss, _ = forward(network, valid)
        grads = torch.autograd.grad(loss, alphas, create_graph=True)
        flat = torch.cat([g.flatten() for g in grads])
        v = torch.randn(len(flat), generator=torch.Generator().manual_seed(0)).to(flat)
        basis, diagonal, beside = [v / v.norm()], [], []
        for _ in range(min(iterations, len(flat))):
            product = torch.autograd.grad(flat @ basis[-1], alphas, retain_graph=True)
            w = torch.cat([p.flatten() for p in averaged(product)])
            diagonal.append((w @ basis[-1]).item())
            for other in basis * 2:                     # twice, as rounding demands
                w = w - (w @ other) * other
            beside.append(w.norm().item())
            if beside[-1] <= 1e-6 * max(map(abs, diagonal)):
                break
            basis.append(w / beside[-1])
    set_tf32(args.tf32)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for k, value in enumerate(beside[:len(diagonal) - 1]):
        matrix[k, k + 1] = matrix[k + 1, k] = value
    return torch.linalg.eigvalsh(matrix)[-1].item() + args.arch_weight_decay


def early_stop(log, epochs):
    """RobustDARTS: the line whose genotype to take, once the eigenvalue has grown, or None.

    Means over five values; a mean of more than 1.3 times that of four values before, which must
    be positive and lie in epoch 10 of 50 or later. log: lines with `epoch` and, some of them,
    `eigenvalue`.
    """
    known = [line for line in log if line.get('eigenvalue') is not None]
    means = [sum(line['eigenvalue'] for line in known[k - 2:k + 3]) / 5
             for k in range(2, len(known) - 2)]
    for k in range(4, len(means)):
        earlier = known[k - 2]                          # in the middle of means[k - 4]
        if earlier['epoch'] >= 10 * epochs / 50 and means[k] > 1.3 * means[k - 4] > 0:
            return earlier
    return None


def finish(folder, genotype, args, **beside):
    """Write genotype.svg and genotype.json, and say what comes next."""
    used = args.method != 'random'
    title = f'{args.method}{f" on {args.data}" * used}, seed {args.seed}'
    write_file(folder / 'genotype.svg', draw(genotype, title))
    write_file(folder / 'genotype.json', to_json(
        genotype, data=args.data if used else None, method=method_of(vars(args)), seed=args.seed,
        arch_data=args.arch_data if used else None, **beside) + '\n')
    if isinstance(genotype, str):
        print(genotype)
        print('test accuracy of this cell, known from NAS-Bench-201: CIFAR-10 {cifar10:.2f}%, '
              'CIFAR-100 {cifar100:.2f}%, ImageNet16-120 {imagenet16:.2f}%; rank {rank:,} of '
              '15,625'.format(**truth(genotype)))
    for cell in ('normal', 'reduce') if not isinstance(genotype, str) else ():
        print(f'{cell:<7}', '  '.join(f'{op}:{state}' for op, state in getattr(genotype, cell)))
    if args.quick:
        print('this was --quick: the pipeline works, the genotype means nothing')
    target = args.source if args.data == 'random_labels' else args.data
    made = target in USED or (Path(target) / 'meta.json').exists()
    target = args.preset if args.preset in REAL else 'cifar10' if made else target
    then = ['python', 'retrain.py', '--arch', str(folder), '--data', target]
    if args.preset == 'laptop':
        then += ['--preset', 'laptop']
    elif target.startswith('cifar') and args.space == 'darts':
        then += ['--auxiliary', '--cutout']
    if target not in REAL and args.image_size:
        then += ['--image_size', str(args.image_size)]
    if target in REAL and args.data_dir != 'data':
        then += ['--data_dir', args.data_dir]
    print('next:', shlex.join([*then, '--gpu', '0']))


# ---------------------------------------------------------------------------------------------
# Setting up


def build(args, num_classes, stem, device, stage, kept):
    """(supernet, SGD for its weights, Adam for its alphas and for nothing else).

    The learning rate is a tensor, so that a CUDA graph sees it change. stage, kept: of P-DARTS.
    """
    space, layers = (DARTS, args.layers) if args.space == 'darts' \
        else (NB201, 3 * args.cells_per_stage + 2)
    if args.method == 'pdarts':
        space = space._replace(operations={**space.operations, 'skip_connect': dropped_skip})
        layers += STAGES[stage][0]
    network = Network(args.init_channels, num_classes, layers, partial=args.partial, stem=stem,
                      space=space, kept=kept, drawn=args.method == 'gdas').to(device)
    start_alike(network)
    if args.method == 'pdarts' and world()[0]:  # each process drops other elements of its skips
        torch.manual_seed((args.seed + world()[0] * 1_000_003 + stage) % 2 ** 62)
    network.strength = torch.zeros((), device=device)
    if args.method in ('gdas', 'dartsminus'):
        network.change = partial(gumbel_one_hot if args.method == 'gdas'
                                 else with_auxiliary_skip, network)
    return network, *optimizers(network, args)


def optimizers(network, args):
    device = next(network.parameters()).device
    cuda = device.type == 'cuda'
    warnings.filterwarnings('ignore', 'This instance was constructed with capturable')
    sgd = torch.optim.SGD(network.weight_parameters(),
                          torch.tensor(args.learning_rate, device=device), momentum=args.momentum,
                          weight_decay=args.weight_decay, nesterov=args.nesterov, fused=cuda,
                          foreach=not cuda)
    adam = torch.optim.Adam(network.architecture_parameters(), args.arch_learning_rate,
                            betas=(0.5, 0.999), weight_decay=args.arch_weight_decay,
                            foreach=True, capturable=cuda)
    return sgd, adam


def two_parts(data, args):
    """int (n,), int (m,): images for the weights and for the alphas, none in both, no patient."""
    first, rest = stratified_split(data.labels, args.train_portion, args.seed, data.patients)
    share = (args.valid_fraction or 1) / (1 - args.train_portion)
    if share > 1 - 1e-9:
        return first, rest
    patients = None if data.patients is None else data.patients[rest]
    return first, rest[stratified_split(data.labels[rest], share, args.seed, patients)[0]]


# ---------------------------------------------------------------------------------------------


def parse(argv):
    """Settings: what was given, else --quick's, else the method's, else the common default."""
    parser = Parser(prog='search.py', description=__doc__.split('\n')[0])
    group = parser.add_argument_group('method')
    group.add_argument('--method', choices=list(DEFAULTS), default='darts')
    group.add_argument('--space', choices=['darts', 'nb201'], default='darts',
                       help='nb201: NAS-Bench-201, where the truth is known')
    group.add_argument('--unrolled', action='store_true', help='second-order step')
    group.add_argument('--arch_data', choices=['valid', 'train', 'none'], default='valid',
                       help='images for the alphas: held out; those of the weights; none: control')
    group.add_argument('--perturb', choices=['random', 'adversarial'], default='random',
                       help='of sdarts')
    group.add_argument('--hessian', type=number(int, 1), metavar='N',
                       help='log its largest eigenvalue every N epochs')
    group.add_argument('--early_stop', action='store_true',
                       help='when that grows, as RobustDARTS does, every 2 epochs by default')
    group.add_argument('--partial', type=number(int, 1), help='1/partial of the channels')
    group.add_argument('--init_channels', type=number(int, 1), default=16)
    group.add_argument('--layers', type=number(int, 3, 200), default=8,
                       help='cells; of pdarts in its first stage')
    group.add_argument('--cells_per_stage', type=number(int, 1, 60), default=5, help='of nb201')
    group.add_argument('--train_portion', '--train_fraction', default=0.5,
                       type=number(float, 0, 1, True, True), help='of the images, for the weights')
    group.add_argument('--valid_fraction', type=number(float, 0, 1, True, True),
                       help='of the images, for the alphas; without it all others')
    group.add_argument('--arch_learning_rate', type=number(float, 0), help='of the alphas')
    group.add_argument('--arch_weight_decay', type=number(float, 0), default=1e-3)
    group.add_argument('--frozen_epochs', type=number(int, 0), help='first epochs without alphas')
    add_run_flags(parser, 'noise', PRESETS)
    first = parser.parse_args(argv)
    preset = preset_of(first, PRESETS)
    rate_for = preset.pop('rate_for', None)
    parser.set_defaults(**preset)
    if parser.parse_args(argv).space == 'nb201':
        parser.set_defaults(**SPACE)
    parser.set_defaults(**{**DEFAULTS[first.method], **preset})
    if first.method == 'pdarts':                # of a stage, which a preset's do not know
        parser.set_defaults(frozen_epochs=DEFAULTS['pdarts']['frozen_epochs'])
    if first.early_stop:
        parser.set_defaults(hessian=2)
    if first.method != 'pcdarts':
        parser.set_defaults(partial=1)
    written = Path(first.data, 'meta.json').exists()
    kind = read_meta(Path(first.data))['kind'] if written else first.data
    if kind in ('noise', 'generated') and 'train_portion' in preset:
        parser.set_defaults(train_portion=0.8, valid_fraction=0.2)      # as many, of fewer images
    if first.quick:
        parser.set_defaults(**QUICK, num_classes=min(preset.get('num_classes', 10), 20))
    defaults = parser.parse_args([])
    # Without --frozen_epochs, their share is that of the default's epochs.
    share = defaults.frozen_epochs / defaults.epochs
    parser.set_defaults(frozen_epochs=None)
    args = parser.parse_args(argv)
    if args.frozen_epochs is None:
        args.frozen_epochs = defaults.frozen_epochs = round(share * args.epochs)
    stages = len(STAGES) if args.method == 'pdarts' else 1
    if 0 < args.epochs <= args.frozen_epochs * stages:
        raise UserError(f'--frozen_epochs {args.frozen_epochs} leaves none of {args.epochs} '
                        'epochs for the alphas: take fewer')
    if args.method == 'pdarts' and args.space == 'nb201':
        raise UserError('--method pdarts: not in --space nb201, whose depth is fixed: take another')
    flag = 'early_stop' if args.early_stop else 'hessian' if args.hessian else 'unrolled'
    if args.method in ('gdas', 'pdarts') and (args.unrolled or args.hessian):
        raise UserError(f'--{flag}: {args.method} draws anew for every loss what is computed, so '
                        'differences of losses mean nothing: leave it out')
    if args.arch_data == 'none' and (args.unrolled or args.hessian):
        raise UserError(f'--{flag}: with --arch_data none there is no loss for the alphas: leave '
                        'it out')
    check_schedule(args, sys.argv[1:] if argv is None else argv, rate_for)
    if args.train_portion + (args.valid_fraction or 0) > 1 + 1e-9:
        raise UserError(f'--train_portion {args.train_portion:g} and --valid_fraction '
                        f'{args.valid_fraction:g} are more than all images: lower one')
    if args.init_channels % args.partial:
        raise UserError(f'--init_channels {args.init_channels} does not divide into --partial '
                        f'{args.partial} parts: take a multiple')
    args.save = args.save or run_name('search', args, vars(defaults))
    return args


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = choose_device(args.gpu, args.tf32)

    if args.method == 'random':                 # the control: no data, nothing to train
        if args.data not in (*USED, *REAL) and not Path(args.data).is_dir():
            raise UserError(f'--data {args.data}: neither a folder nor one of '
                            f'{", ".join([*USED, *REAL])}')
        run = open_run(args, device)
        if run and not world()[0]:
            make = random_string if args.space == 'nb201' else random_genotype
            write_log(run[0], {'epoch': 0, 'genotype': plain(make(args.seed)), 'seconds': 0})
            finish(run[0], make(args.seed), args)
        return

    if finished(Path(args.save)):               # then a loop goes on without reading the data
        open_run(args, device)
        return

    # Data: images for the weights and, where they are to be held out, others for the alphas.
    data = find_or_make(args)
    stem = stem_of(args, data.image_size)
    halves = two_parts(data, args)[:2 if args.arch_data == 'valid' else 1]
    batches = [Batches(data, half, args.batch_size, device, args.augment, seed=2 * args.seed + k,
                       workers=args.workers) for k, half in enumerate(halves)]
    epochs, steps, total = shortened(args, min(len(b) for b in batches))
    stages = len(STAGES) if args.method == 'pdarts' else 1
    if 0 < epochs < stages:
        raise UserError(f'--epochs: {epochs} in all make no {stages} stages of pdarts: take more, '
                        'or more --max_steps')
    first = [k * epochs // stages for k in range(stages + 1)]      # epochs of the stages
    frozen = round(args.frozen_epochs * epochs / args.epochs)

    run = open_run(args, device)
    if run is None:
        return
    folder, checkpoint = run

    torch.manual_seed(args.seed)
    stage, kept = (checkpoint or {}).get('stage', 0), (checkpoint or {}).get('kept')
    network, sgd, adam = build(args, len(data.classes), stem, device, stage, kept)
    start, start_step, seconds = 0, 0, 0.0
    sums = torch.zeros(4, device=device)        # train loss and right answers, valid the same
    moments = [torch.zeros(2, *a.shape, device=device) for a in network.architecture_parameters()]
    if checkpoint:
        start, start_step, seconds = load_states(
            checkpoint, folder / 'checkpoint.pt', ('epoch', 'step', 'seconds'), network=network,
            sgd=sgd, adam=adam)
        sums = own_sums(checkpoint['sums']).to(device)
        for pair, saved in zip(moments, checkpoint.get('moments', ())):
            pair.copy_(saved)
        sgd.param_groups[0]['lr'] = sgd.param_groups[0]['lr'].to(device)
    lines = read_log(folder, 'epoch', 'genotype', torn=True) if checkpoint else []
    log = [line for line in lines if line['epoch'] < start]

    def one_step(is_frozen, *batch):
        return bilevel_step(network, batch[:2], batch[-2:], sgd, adam, args, is_frozen, moments)

    def graphed():
        on = args.graph == 'auto' and world()[1] == 1 and args.method != 'gdas'
        return {is_frozen: GraphedStep(
            partial(one_step, is_frozen), lambda: {**changed_by_a_step(network, sgd, adam),
                                               'moments': moments}, device, on)
                for is_frozen in (True, False)}

    def save(epoch, step):
        save_file(folder / 'checkpoint.pt', {
            'network': network.state_dict(), 'sgd': sgd.state_dict(), 'adam': adam.state_dict(),
            'stage': stage, 'kept': kept, 'moments': [t.cpu() for t in moments],
            'epoch': epoch, 'step': step, 'sums': torch.stack(gathered(sums.cpu())),
            'seconds': running.seconds if step else 0.0,
            'random': gathered(random_states(device))})

    print(f'{args.method}{", second order" * args.unrolled} on {data.name} '
          f'({len(data):,} images of {data.image_size} px, {len(data.classes)} classes), '
          f'{total:,} steps on {world()[1]} x {device.type}, in {folder}')
    progress = Progress(total, 'steps', min(start * steps + start_step, total))
    network.train()
    steps_of, stop = graphed(), early_stop(log, epochs)
    with Running(folder, device, args.checkpoint_minutes) as running:
        for epoch in range(start, epochs):
            if args.early_stop and stop:
                break
            if epoch == first[stage + 1]:       # P-DARTS: the next stage, from new weights
                stage, kept = stage + 1, strongest(network, STAGES[stage + 1][1])
                network, sgd, adam = build(args, len(data.classes), stem, device, stage, kept)
                network.train()
                steps_of = graphed()
            past, length = epoch - first[stage], first[stage + 1] - first[stage]
            is_frozen = past < min(frozen, length - 1)
            if not is_frozen:
                steps_of.pop(True, None)        # its CUDA graph holds the memory of a step
            learning_rate = learning_rate_at(args, past, length)
            sgd.param_groups[0]['lr'].fill_(learning_rate)
            strength = strength_at(args, past, length, frozen)
            network.strength.fill_(strength)
            for skip in (m for m in network.modules() if isinstance(m, DroppedSkip)):
                skip.probability.fill_(STAGES[stage][2] * strength)
            last = min(steps, total - epoch * steps)
            running.epoch(seconds, epoch * steps)
            draws = zip(*(b.epoch(epoch, start_step) for b in batches))
            for step, pair in zip(range(start_step, last), draws):
                sums += steps_of[is_frozen](*(t for batch in pair for t in batch))
                progress.update(epoch * steps + step + 1, f'epoch {epoch + 1}/{epochs}')
                if running.is_to_save([sums, *network.parameters()], step, last):
                    save(epoch, step + 1)
                    if running:
                        return running.stopped()
            train_loss, train_right, valid_loss, valid_right = averaged([sums])[0].div(
                last).tolist()
            images, seen = args.batch_size / world()[1], not is_frozen and args.arch_data != 'none'
            check_alike(network.architecture_parameters(), 'alphas')
            line = {
                'epoch': epoch, 'steps': last, 'learning_rate': learning_rate, 'strength': strength,
                'train_loss': train_loss, 'train_accuracy': train_right / images,
                'valid_loss': valid_loss if seen else None,
                'valid_accuracy': valid_right / images if seen else None,
                **describe(network, moments, last, log[-1] if log else None)}
            if args.hessian and epoch % args.hessian == 0:
                line['eigenvalue'] = largest_eigenvalue(network, pair[-1], args)
            write_log(folder, {
                **line, 'seconds': round(running.seconds, 3),
                'images_per_second': round(
                    len(batches) * last * args.batch_size / running.seconds, 1),
                'peak_memory_mib': peak_memory_mib(device)})
            log.append(line)
            stop = early_stop(log, epochs)
            sums, start_step, seconds = torch.zeros_like(sums), 0, 0.0
            torch._foreach_zero_(moments)
            save(epoch + 1, 0)
            if running and epoch + 1 < epochs:
                return running.stopped()
        progress.close()
        genotype, beside = network.genotype(), {}
        if args.method == 'pdarts':
            beside['without_restriction'] = plain(genotype)
            genotype = restricted(network)
        if stop:
            beside['early_stop'] = {key: stop[key] for key in ('epoch', 'genotype')}
            genotype = from_plain(stop['genotype']) if args.early_stop else genotype
        if not world()[0]:
            finish(folder, genotype, args, **beside)


if __name__ == '__main__':
    sys.exit(main())
