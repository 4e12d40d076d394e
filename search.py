"""Search a cell on unreal or real data: bilevel, differentiable, ending in a genotype.

    python search.py --data noise --gpu 0                          # DARTS, first order, 50 epochs
    python search.py --data noise --method pcdarts --gpu 0
    python search.py --data random_labels --unrolled --gpu 0       # second order
    python search.py --data noise --quick                          # a minute on a CPU, meaningless
    python search.py --data imagenet --data_dir DIR --method pcdarts --gpu 0     # 224 px
    python search.py --data chexpert --data_dir DIR --gpu 0
    torchrun --nproc_per_node 8 search.py --data imagenet --data_dir DIR --method pcdarts --resume
    for s in 0 1 2 3; do python search.py --data noise --seed $s --gpu 0 --resume; done

The last line can be stopped and started again at will: --resume goes on from the last checkpoint,
starts a run that has none and skips one that is done. Missing unreal data are made first.
Sources: DARTS (arXiv 1806.09055), PC-DARTS (arXiv 1907.05737); defaults in DEFAULTS below.
"""
import shlex
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from evaluate import (GraphedStep, Running, add_run_flags, averaged, changed_by_a_step,
                      check_alike, check_schedule, correct, gathered, learning_rate_at, load_states,
                      loss_of, open_run, own_sums, peak_memory_mib, preset_of, random_states,
                      run_name, shortened, start_alike, stem_of, write_log)
from generate_data import (REAL, USED, Batches, Parser, Progress, UserError, choose_device,
                           find_or_make, number, one_line_errors, save_file, set_tf32,
                           stratified_split, world, write_file)
from genotypes import draw, random_genotype, to_json
from model_search import Network

import torch

# Published settings by method. Frozen epochs are those at the start in which only weights train.
DEFAULTS = {
    'darts': dict(batch_size=64, learning_rate=0.025, learning_rate_min=0.001,
                  arch_learning_rate=3e-4, frozen_epochs=0, partial=1),
    'pcdarts': dict(batch_size=256, learning_rate=0.1, learning_rate_min=0.0,
                    arch_learning_rate=6e-4, frozen_epochs=15, partial=4),
    'random': dict(batch_size=64, learning_rate=0.025, learning_rate_min=0.001,
                   arch_learning_rate=3e-4, frozen_epochs=0, partial=1)}
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
                     source='chexpert', train_portion=0.1, valid_fraction=0.1)}
# --quick: the whole pipeline within a minute on two cores; what it finds means nothing.
QUICK = dict(num_images=1000, layers=5, init_channels=8, batch_size=32, epochs=3, warmup_epochs=0,
             steps_per_epoch=4, frozen_epochs=0, arch_learning_rate=3e-3, train_portion=0.5,
             valid_fraction=None)


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
    take. The weights are moved in place and put back; there is no second network. Returns
    (gradients, loss, right answers) at w' on the validation batch.
    """
    weights, alphas = network.weight_parameters(), network.architecture_parameters()
    group = sgd.param_groups[0]
    eta, values = group['lr'], [w.data for w in weights]
    with network.frozen_statistics():
        with trained(network, weights=True):
            step, *_ = gradients(network, train, weights, args)
        before = [v.clone() for v in values]
        step = torch._foreach_add(step, before, alpha=group['weight_decay'])
        if sgd.state:
            buffers = [sgd.state[w]['momentum_buffer'] for w in weights]
            torch._foreach_add_(step, buffers, alpha=group['momentum'])
        torch._foreach_mul_(step, -eta)
        torch._foreach_add_(values, step)
        grads, loss, right = gradients(network, valid, weights + alphas, args)
        dw, dalpha = grads[:len(weights)], grads[len(weights):]
        # Equation 8 by finite differences along dw; none where dw is zero or not finite. The two
        # losses differ in their last digits only, so neither autocast nor TF32 may round them.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dw)))
        sound = (norm > 0) & norm.isfinite()
        eps = torch.where(sound, 0.01 / norm, 1.0)
        torch._foreach_mul_(dw, torch.where(sound, eps, 0.0))
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


def architecture_step(network, train, valid, sgd, adam, args):
    """Step the alphas; returns (loss, right answers) on the validation batch before it."""
    if args.unrolled:
        grads, loss, right = second_order(network, train, valid, sgd, args)
    else:
        grads, loss, right = first_order(network, valid, args)
    for alpha, grad in zip(network.architecture_parameters(), grads):
        alpha.grad = grad
    adam.step()
    adam.zero_grad()
    return loss, right


def weight_step(network, train, sgd, args):
    """Step the weights; returns (loss, right answers) on the training batch before it."""
    weights = network.weight_parameters()
    with trained(network, weights=True):
        grads, loss, right = gradients(network, train, weights, args)
    for weight, grad in zip(weights, grads):
        weight.grad = grad
    torch.nn.utils.clip_grad_norm_(weights, args.grad_clip, foreach=True)
    sgd.step()
    sgd.zero_grad()
    return loss, right


# ---------------------------------------------------------------------------------------------
# The result


def describe(network):
    """What log.jsonl says of the alphas: genotype, entropy in nats, skips, the alphas."""
    genotype, line = network.genotype(), {}
    for cell in ('normal', 'reduce'):
        p = torch.softmax(network.alphas[cell].detach().double().cpu(), 1)
        line[f'entropy_{cell}'] = -(p * p.log()).sum(1).mean().item()
        line[f'skips_{cell}'] = sum(op == 'skip_connect' for op, _ in getattr(genotype, cell))
    alphas = {name: a.detach().cpu().tolist() for name, a in network.alphas.items()}
    return {**line, 'genotype': genotype._asdict(), 'alphas': alphas}


def finish(folder, genotype, args):
    """Write genotype.svg and genotype.json, and say what comes next."""
    title = f'{args.method} on {args.data}, seed {args.seed}'
    write_file(folder / 'genotype.svg', draw(genotype, title))
    write_file(folder / 'genotype.json', to_json(
        genotype, data=args.data, method=args.method, seed=args.seed) + '\n')
    for cell in ('normal', 'reduce'):
        print(f'{cell:<7}', '  '.join(f'{op}:{state}' for op, state in getattr(genotype, cell)))
    if args.quick:
        print('this was --quick: the pipeline works, the genotype means nothing')
    target = args.source if args.data == 'random_labels' else args.data
    target = args.preset if args.preset in REAL else 'cifar10' if target in USED else target
    print(f'next: python retrain.py --arch {shlex.quote(str(folder))} --data {shlex.quote(target)}'
          f'{" --auxiliary --cutout" * target.startswith("cifar")} --gpu 0')


def bilevel_step(network, train, valid, sgd, adam, args, frozen=False):
    """Step the alphas, unless `frozen`, then the weights.

    Returns (4,): loss and right answers on the training batch, the same on the validation batch.
    """
    parts = () if frozen else architecture_step(network, train, valid, sgd, adam, args)
    sums = torch.stack([*weight_step(network, train, sgd, args), *parts])
    return torch.cat([sums, torch.zeros_like(sums)]) if frozen else sums


def optimizers(network, args):
    """SGD for the weights, Adam for the alphas and for nothing else.

    The learning rate is a tensor, so that a CUDA graph sees it change.
    """
    device = next(network.parameters()).device
    cuda = device.type == 'cuda'
    sgd = torch.optim.SGD(network.weight_parameters(),
                          torch.tensor(args.learning_rate, device=device), momentum=args.momentum,
                          weight_decay=args.weight_decay, fused=cuda, foreach=not cuda)
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
    group.add_argument('--unrolled', action='store_true', help='second-order step')
    group.add_argument('--partial', type=number(int, 1), help='1/partial of the channels')
    group.add_argument('--init_channels', type=number(int, 1), default=16)
    group.add_argument('--layers', type=number(int, 3, 200), default=8, help='cells')
    group.add_argument('--train_portion', '--train_fraction', default=0.5,
                       type=number(float, 0, 1, True, True), help='of the images, for the weights')
    group.add_argument('--valid_fraction', type=number(float, 0, 1, True, True),
                       help='of the images, for the alphas; without it all others')
    group.add_argument('--arch_learning_rate', type=number(float, 0), help='of the alphas')
    group.add_argument('--arch_weight_decay', type=number(float, 0), default=1e-3)
    group.add_argument('--frozen_epochs', type=number(int, 0), help='first epochs without alphas')
    add_run_flags(parser, 'noise', dict(epochs=50))
    first = parser.parse_args(argv)
    preset = preset_of(first, PRESETS)
    rate_for = preset.pop('rate_for', None)
    parser.set_defaults(**{**DEFAULTS[first.method], **preset})
    if first.method != 'pcdarts':
        parser.set_defaults(partial=1)
    if first.data in ('noise', 'generated') and 'train_portion' in preset:
        parser.set_defaults(train_portion=0.8, valid_fraction=0.2)      # as many, of fewer images
    if first.quick:
        parser.set_defaults(**QUICK, num_classes=min(preset.get('num_classes', 10), 20))
    defaults = parser.parse_args([])
    # Without --frozen_epochs, their share is that of the published 50 epochs.
    share = defaults.frozen_epochs / 50
    parser.set_defaults(frozen_epochs=None)
    args = parser.parse_args(argv)
    if args.frozen_epochs is None:
        args.frozen_epochs = defaults.frozen_epochs = round(share * args.epochs)
    if 0 < args.epochs <= args.frozen_epochs:
        raise UserError(f'--frozen_epochs {args.frozen_epochs} leaves none of {args.epochs} '
                        'epochs for the alphas: take fewer')
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
            genotype = random_genotype(args.seed)
            write_log(run[0], {'epoch': 0, 'genotype': genotype._asdict(), 'seconds': 0})
            finish(run[0], genotype, args)
        return

    # Data: half of the images for the weights, half for the alphas, no image in both.
    data = find_or_make(args)
    stem = stem_of(args, data.image_size)
    halves = two_parts(data, args)
    batches = [Batches(data, half, args.batch_size, device, args.augment, seed=2 * args.seed + k,
                       workers=args.workers) for k, half in enumerate(halves)]
    epochs, steps, total = shortened(args, min(len(b) for b in batches))
    frozen = round(args.frozen_epochs * epochs / args.epochs)

    run = open_run(args, device)
    if run is None:
        return
    folder, checkpoint = run

    torch.manual_seed(args.seed)
    network = Network(args.init_channels, len(data.classes), args.layers, partial=args.partial,
                      stem=stem).to(device)
    start_alike(network)
    sgd, adam = optimizers(network, args)
    start, start_step, seconds = 0, 0, 0.0
    sums = torch.zeros(4, device=device)        # train loss and right answers, valid the same
    if checkpoint:
        start, start_step, seconds = load_states(
            checkpoint, folder / 'checkpoint.pt', ('epoch', 'step', 'seconds'), network=network,
            sgd=sgd, adam=adam)
        sums = own_sums(checkpoint['sums']).to(device)
    rate = sgd.param_groups[0]['lr'] = sgd.param_groups[0]['lr'].to(device)

    def step(is_frozen, *batch):
        return bilevel_step(network, batch[:2], batch[2:], sgd, adam, args, is_frozen)

    steps_of = {is_frozen: GraphedStep(
        partial(step, is_frozen), lambda: changed_by_a_step(network, sgd, adam), device,
        args.graph == 'auto' and world()[1] == 1) for is_frozen in (True, False)}

    def save(epoch, step):
        save_file(folder / 'checkpoint.pt', {
            'network': network.state_dict(), 'sgd': sgd.state_dict(), 'adam': adam.state_dict(),
            'epoch': epoch, 'step': step, 'sums': torch.stack(gathered(sums.cpu())),
            'seconds': running.seconds if step else 0.0,
            'random': gathered(random_states(device))})

    print(f'{args.method}{", second order" * args.unrolled} on {data.name} '
          f'({len(data):,} images of {data.image_size} px, {len(data.classes)} classes), '
          f'{total:,} steps on {world()[1]} x {device.type}, in {folder}')
    progress = Progress(total, 'steps', min(start * steps + start_step, total))
    network.train()
    with Running(folder, device, args.checkpoint_minutes) as running:
        for epoch in range(start, epochs):
            learning_rate = learning_rate_at(args, epoch, epochs)
            rate.fill_(learning_rate)
            last = min(steps, total - epoch * steps)
            pairs = zip(*(b.epoch(epoch, start_step) for b in batches))
            running.epoch(seconds, epoch * steps)
            for step in range(start_step, last):
                train, valid = next(pairs)
                sums += steps_of[epoch < frozen](*train, *valid)
                progress.update(epoch * steps + step + 1, f'epoch {epoch + 1}/{epochs}')
                if running.is_to_save([sums, *network.parameters()], step, last):
                    save(epoch, step + 1)
                    if running:
                        return running.stopped()
            train_loss, train_right, valid_loss, valid_right = averaged([sums])[0].div(
                last).tolist()
            images, trained_alphas = args.batch_size / world()[1], epoch >= frozen
            check_alike(network.architecture_parameters(), 'alphas')
            write_log(folder, {
                'epoch': epoch, 'learning_rate': learning_rate, 'train_loss': train_loss,
                'train_accuracy': train_right / images,
                'valid_loss': valid_loss if trained_alphas else None,
                'valid_accuracy': valid_right / images if trained_alphas else None,
                **describe(network), 'seconds': round(running.seconds, 3),
                'images_per_second': round(2 * last * args.batch_size / running.seconds, 1),
                'peak_memory_mib': peak_memory_mib(device)})
            sums, start_step, seconds = torch.zeros_like(sums), 0, 0.0
            save(epoch + 1, 0)
            if running and epoch + 1 < epochs:
                return running.stopped()
        progress.close()
        if not world()[0]:
            finish(folder, network.genotype(), args)


if __name__ == '__main__':
    sys.exit(main())
