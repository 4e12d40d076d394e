r"""Train the network of a genotype from scratch: on CIFAR, ImageNet, CheXpert, or unreal data.

    python retrain.py --arch DARTS_V2 --data cifar10 --auxiliary --cutout --gpu 0   # 600 epochs
    python retrain.py --arch runs/NAME --data cifar10 --auxiliary --cutout --gpu 0  # of a search
    python retrain.py --arch runs/NAME --data noise --gpu 0          # how well can it fit noise?
    python retrain.py --arch runs/NAME --data noise --preset laptop  # of nb201, on a CPU
    python retrain.py --arch runs/NAME --data cifar10 --quick        # a minute on a CPU
    torchrun --nproc_per_node 8 retrain.py --arch runs/NAME --data imagenet --data_dir DIR \
        --auxiliary --amp --resume
    python retrain.py --arch runs/NAME --data chexpert --data_dir DIR --gpu 0
    ... --resume                                                     # go on, or start

The last epoch's test error is the result; on CheXpert the epoch is chosen on held-out patients.
Recipe: DARTS (arXiv 1806.09055), with cutout (arXiv 1708.04552), an auxiliary head (arXiv
1409.4842) and drop-path (arXiv 1605.07648); on ImageNet that of PC-DARTS (arXiv 1907.05737).
"""
import contextlib
import math
import shlex
import sys
import warnings
from pathlib import Path

from evaluate import (GraphedStep, Running, add_run_flags, areas, averaged, by_study,
                      changed_by_a_step, check_finite, check_layers, check_schedule, correct,
                      find_genotype, finished, gathered, learning_rate_at, load_states, loss_of,
                      open_run, own_sums, peak_memory_mib, preset_of, random_states, run_name,
                      shortened, start_alike, stem_of, test, widest, write_log)
from generate_data import (REAL, Batches, Parser, Progress, UserError, choose_device,
                           find_or_make, name_or_path, number, one_line_errors, read_by,
                           save_file, stratified_split, world)
from genotypes import plain
from model_search import Network

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# Recipes. nb201: that of the benchmark, three stages of five cells; by default for its cells.
# ImageNet: that of PC-DARTS and P-DARTS, whose linear fall from 0.5 is worth more than a point over
# DARTS's own; the learning rate is for 1,024 images. CheXpert: our own choice.
PRESETS = {
    'cifar': dict(epochs=600, batch_size=96, learning_rate=0.025, learning_rate_min=0.0),
    'nb201': dict(epochs=200, batch_size=256, learning_rate=0.1, learning_rate_min=0.0,
                  nesterov=True, weight_decay=5e-4, drop_path_prob=0.0, init_channels=16,
                  layers=17),
    # Our own: how well does a cell of NAS-Bench-201 fit, and generalise? In a minute on one core.
    'laptop': dict(epochs=20, batch_size=64, learning_rate=0.1, learning_rate_min=0.0,
                   nesterov=True, weight_decay=5e-4, drop_path_prob=0.0, init_channels=16,
                   layers=5, image_size=16, train_portion=0.04, augment='none'),
    'imagenet': dict(epochs=250, batch_size=1024, rate_for=1024, learning_rate=0.5,
                     learning_rate_min=0.0, schedule='linear', warmup_epochs=5, weight_decay=3e-5,
                     label_smoothing=0.1, drop_path_prob=0.0, init_channels=48, layers=14,
                     image_size=224, num_images=128000, num_classes=1000, source='imagenet'),
    'chexpert': dict(epochs=5, batch_size=32, optimizer='adam', learning_rate=1e-4,
                     learning_rate_min=0.0, weight_decay=0.0, drop_path_prob=0.0, init_channels=48,
                     layers=14, image_size=320, holdout_patients=0.02, num_images=20000,
                     num_classes=14, multilabel=True, source='chexpert')}
QUICK = dict(num_images=1000, epochs=2, steps_per_epoch=40, batch_size=32, init_channels=8,
             layers=5, warmup_epochs=0)
FIT_IMAGES = 10000          # training images on which the fit is measured at the end
EVALUATION_BATCH = 250, 50  # up to 64 px, above; in evaluation mode images do not meet


def train_step(network, batch, sgd, args):
    """One step of the weights; returns (loss without the auxiliary head's, right answers).

    In --grad_accum parts, one at a time; of several processes each has its share of the batch,
    and DistributedDataParallel averages what the last part leaves.
    """
    parts, sums = list(zip(*(t.chunk(args.grad_accum) for t in batch))), 0
    for k, (x, y) in enumerate(parts):
        waits = k + 1 < len(parts) and hasattr(network, 'no_sync')
        with network.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp,
                                cache_enabled=False):
                logits = network(x)
            logits, auxiliary_logits = logits if args.auxiliary else (logits, None)
            loss = total = loss_of(logits.float(), y, args.label_smoothing)
            if args.auxiliary:
                total = loss + args.auxiliary_weight * loss_of(auxiliary_logits.float(), y,
                                                               args.label_smoothing)
            (total / len(parts)).backward()
        sums = sums + torch.stack([loss.detach() / len(parts), correct(logits.detach(), y)])
    torch.nn.utils.clip_grad_norm_(network.parameters(), args.grad_clip, foreach=True)
    sgd.step()
    sgd.zero_grad()
    return sums.unbind()


def optimizer(network, args):
    """SGD or Adam, whose learning rate is a tensor, so that a CUDA graph sees it change."""
    device = next(network.parameters()).device
    warnings.filterwarnings('ignore', 'This instance was constructed with capturable')
    cuda, rate = device.type == 'cuda', torch.tensor(args.learning_rate, device=device)
    if args.optimizer == 'adam':
        return torch.optim.Adam(network.parameters(), rate, weight_decay=args.weight_decay,
                                foreach=cuda, capturable=cuda)
    return torch.optim.SGD(network.parameters(), rate, momentum=args.momentum,
                           weight_decay=args.weight_decay, nesterov=args.nesterov, fused=cuda,
                           foreach=not cuda)


def scored(network, batches, prefix):
    """What log.jsonl says of a test on some images: error, or with several labels AUROC."""
    score = test(network, batches)
    if 'top1' in score:
        return {f'{prefix}_error': 100 * (1 - score['top1']), f'{prefix}_loss': score['loss']}
    data, rows = batches.data, score['rows']
    pooled = by_study(score['scores'], data.labels[rows],
                      None if data.studies is None else data.studies[rows])
    return {f'{prefix}_auroc': areas(*pooled, data.classes)['auroc_tasks'],
            f'{prefix}_loss': score['loss']}


def parse(argv):
    """Settings: what was given, else --quick's, else DARTS's."""
    parser = Parser(prog='retrain.py', description=__doc__.split('\n')[0])
    group = parser.add_argument_group('network')
    group.add_argument('--arch', required=True, type=name_or_path,
                       help='a published name, a genotype.json or the folder of a search')
    group.add_argument('--init_channels', type=number(int, 1, 4096), default=36)
    group.add_argument('--layers', type=number(int, 1, 200), default=20, help='cells')
    group.add_argument('--auxiliary', action='store_true', help='a second head while training')
    group.add_argument('--auxiliary_weight', type=number(float, 0), default=0.4)
    group.add_argument('--drop_path_prob', type=number(float, 0, 1, open_high=True), default=0.2,
                       help='reached linearly at the end')
    group.add_argument('--max_multiply_adds', type=number(float, 0, open_low=True),
                       help='of one image: takes the most --init_channels that fit')
    group.add_argument('--cutout', action='store_true')
    group.add_argument('--cutout_length', type=number(int, 1), default=16, help='pixels')
    group = parser.add_argument_group('recipe')
    group.add_argument('--optimizer', choices=['sgd', 'adam'], default='sgd')
    group.add_argument('--label_smoothing', type=number(float, 0, 1, open_high=True), default=0.0)
    group.add_argument('--ema', type=number(float, 0, 1, open_high=True), default=0.0,
                       help='decay of an average of the weights, which is what is tested')
    group.add_argument('--holdout_patients', type=number(float, 0, 1, open_high=True), default=0.0,
                       help='share of the patients on whom the epoch to keep is chosen')
    group.add_argument('--train_portion', '--train_fraction', default=1.0,
                       type=number(float, 0, 1, open_low=True), help='of the images, trained on')
    add_run_flags(parser, 'cifar10', PRESETS)
    first = parser.parse_args(argv)
    real = first.source if first.data == 'random_labels' else first.data
    if first.preset == 'auto' and real not in PRESETS \
            and isinstance(find_genotype(first.arch)[0], str):
        first.preset = 'nb201'
    preset = preset_of(first, PRESETS)
    rate_for = preset.pop('rate_for', None)
    parser.set_defaults(**preset)
    if first.quick:
        rate = {'learning_rate': 0.05} if parser.parse_args(argv).optimizer == 'sgd' else {}
        parser.set_defaults(**QUICK, **rate, num_classes=min(preset.get('num_classes', 10), 20))
        rate_for = None
    args = parser.parse_args(argv)
    check_layers(find_genotype(args.arch)[0], args.layers)
    if args.max_steps == 0:
        raise UserError('--max_steps 0: nothing would be trained; take 1 or more')
    check_schedule(args, sys.argv[1:] if argv is None else argv, rate_for)
    defaults = vars(parser.parse_args(['--arch', args.arch]))
    for name, used, where in (('auxiliary_weight', args.auxiliary, 'without --auxiliary'),
                              ('cutout_length', args.cutout, 'without --cutout'),
                              ('init_channels', not args.max_multiply_adds,
                               'beside --max_multiply_adds')):
        if not used and getattr(args, name) != defaults[name]:
            raise UserError(f'--{name} means nothing {where}: leave it out')
    args.save = args.save or run_name('retrain', args, defaults)
    return args


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = choose_device(args.gpu, args.tf32)
    genotype, found_by = find_genotype(args.arch)
    if finished(Path(args.save)) and not args.max_multiply_adds:
        open_run(args, device)                  # a loop goes on without reading the data
        return
    data = find_or_make(args)
    stem = stem_of(args, data.image_size)
    if args.label_smoothing and data.multilabel:
        raise UserError(f'--label_smoothing {args.label_smoothing}: {args.data} has several labels '
                        'an image, which are not smoothed: take 0')
    if args.max_multiply_adds:
        args.init_channels = widest(genotype, args.max_multiply_adds, args.layers,
                                    len(data.classes), data.image_size, stem)
    rows, held = np.arange(len(data)), ()
    if args.train_portion < 1:
        rows, _ = stratified_split(data.labels, args.train_portion, args.seed, data.patients)
    if args.holdout_patients:               # of the images, where there are no patients
        parts = stratified_split(data.labels[rows], 1 - args.holdout_patients, args.seed,
                                 None if data.patients is None else data.patients[rows])
        rows, held = (rows[part] for part in parts)
        if not len(held):
            raise UserError(f'--holdout_patients {args.holdout_patients} of {args.data} is '
                            'nobody: raise it')

    def whole(data, rows):
        return Batches(data, rows, EVALUATION_BATCH[data.image_size > 64], device,
                       shuffle=False, workers=args.workers)

    batches = Batches(data, rows, args.batch_size, device, args.augment,
                      args.cutout_length if args.cutout else 0, 2 * args.seed, True, args.workers)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), FIT_IMAGES)).astype(int)
    fit_batches, held_batches = whole(data, rows[chosen]), whole(data, held)
    test_data, test_batches = None, None
    if data.kind == 'real':
        test_data = read_by(args, args.data, 'test')
    if test_data:
        test_batches = whole(test_data, range(len(test_data)))
    epochs, steps, total = shortened(args, len(batches))

    run = open_run(args, device)
    if run is None:
        return
    folder, checkpoint = run

    torch.manual_seed(args.seed)
    network = Network(args.init_channels, len(data.classes), args.layers, genotype,
                      auxiliary=args.auxiliary, stem=stem).to(device)
    start_alike(network)
    if world()[0]:
        torch.manual_seed((args.seed + world()[0] * 1_000_003) % 2 ** 62)       # of drop-path
    if args.drop_path_prob:
        network.drop_path_prob = torch.zeros((), device=device)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(args.ema),
                            use_buffers=True) if args.ema else None
    tested = average.module if args.ema else network
    shared = network
    if world()[1] > 1:      # batch statistics are of each process, running ones those of the first
        warnings.filterwarnings('ignore', 'Grad strides do not match')      # of 1x1 kernels
        idle = isinstance(genotype, str) or min(
            len(genotype.normal_concat), len(genotype.reduce_concat)) < 4
        shared = DistributedDataParallel(
            network, [device] if device.type == 'cuda' else None, find_unused_parameters=idle)
    sgd = optimizer(network, args)
    start, start_step, seconds, best, best_held = 0, 0, 0.0, math.inf, math.inf
    sums, kept = torch.zeros(2, device=device), {}          # loss and right answers
    if checkpoint:
        parts = {'network': network, 'sgd': sgd, **({'average': average} if average else {})}
        start, start_step, seconds, best, best_held = load_states(
            checkpoint, folder / 'checkpoint.pt', ('epoch', 'step', 'seconds', 'best',
                                                   'best_held'), **parts)
        sums, kept = own_sums(checkpoint['sums']).to(device), checkpoint['kept']
    rate = sgd.param_groups[0]['lr'] = sgd.param_groups[0]['lr'].to(device)
    graphed = GraphedStep(lambda *batch: torch.stack(train_step(shared, batch, sgd, args)),
                          lambda: changed_by_a_step(network, sgd), device,
                          args.graph == 'auto' and world()[1] == 1)

    def save(epoch, step):
        save_file(folder / 'checkpoint.pt', {
            'network': network.state_dict(), 'sgd': sgd.state_dict(), 'epoch': epoch,
            'step': step, 'sums': torch.stack(gathered(sums.cpu())), 'best': best,
            'best_held': best_held, 'kept': kept, 'seconds': running.seconds if step else 0.0,
            'random': gathered(random_states(device)),
            **({'average': average.state_dict()} if average else {})})

    print(f'{args.arch} (C={args.init_channels}) on {data.name} ({len(rows):,} images of '
          f'{data.image_size} px, {len(data.classes)} classes), {total:,} steps on '
          f'{world()[1]} x {device.type}, in {folder}')
    progress = Progress(total, 'steps', min(start * steps + start_step, total))
    with Running(folder, device, args.checkpoint_minutes) as running:
        for epoch in range(start, epochs):
            learning_rate = learning_rate_at(args, epoch, epochs)
            rate.fill_(learning_rate)
            drop_path_prob = args.drop_path_prob * epoch / epochs
            if drop_path_prob:
                network.drop_path_prob.fill_(drop_path_prob)
            network.train()
            last = min(steps, total - epoch * steps)
            running.epoch(seconds, epoch * steps)
            for step, batch in zip(range(start_step, last), batches.epoch(epoch, start_step)):
                sums += graphed(*batch)
                if average:
                    average.update_parameters(network)
                progress.update(epoch * steps + step + 1, f'epoch {epoch + 1}/{epochs}')
                if running.is_to_save([sums, *network.parameters()], step, last):
                    save(epoch, step + 1)
                    if running:
                        return running.stopped()
            seconds = running.seconds
            start_alike(network)                # with the running statistics of the first process
            start_alike(tested)
            train_loss, right = averaged([sums])[0].div(last).tolist()
            line = {'epoch': epoch, 'learning_rate': learning_rate,
                    'drop_path_prob': drop_path_prob, 'train_loss': train_loss,
                    'train_accuracy': right * world()[1] / args.batch_size, 'test_error': None,
                    'test_loss': None, 'best_test_error_selected_on_test': None}
            if len(held):
                line.update(scored(tested, held_batches, 'holdout'))
                worth = line.get('holdout_error')
                if data.multilabel:
                    worth = -(line['holdout_auroc'] or 0)
                if worth < best_held:
                    best_held = worth
                    kept = {name: t.detach().cpu().clone()
                            for name, t in tested.state_dict().items()}
            if test_batches:
                line.update(scored(tested, test_batches, 'test'))
                if not data.multilabel:
                    best = min(best, line['test_error'])
                    line['best_test_error_selected_on_test'] = best
            if epoch + 1 == epochs:             # without augmentation, in evaluation mode
                if kept:
                    tested.load_state_dict(kept)        # what weights.pt will hold
                fit = test(tested, fit_batches)
                line.update(fit_loss=fit['loss'], fit_accuracy=fit.get('top1'),
                            fit_images=fit['n'])
                if data.multilabel:
                    line['fit_auroc'] = areas(fit['scores'], data.labels[fit['rows']],
                                              data.classes)['auroc_tasks']
            measured = [line[k] for k in ('test_loss', 'fit_loss') if line.get(k) is not None]
            check_finite([torch.tensor(measured or [0.0])], folder, epoch * steps + last)
            write_log(folder, {
                **line, 'seconds': round(seconds, 3),
                'images_per_second': round(last * args.batch_size / seconds, 1),
                'peak_memory_mib': peak_memory_mib(device)})
            sums, start_step, seconds = torch.zeros_like(sums), 0, 0.0
            save(epoch + 1, 0)
            if running and epoch + 1 < epochs:
                return running.stopped()
        progress.close()
        save_file(folder / 'weights.pt', {'network': kept or tested.state_dict(), 'meta': {
            'arch': args.arch, 'genotype': plain(genotype),
            'found_by': found_by, 'init_channels': args.init_channels, 'layers': args.layers,
            'auxiliary': args.auxiliary, 'stem': stem, 'classes': data.classes, 'mean': data.mean,
            'std': data.std, 'image_size': data.image_size, 'multilabel': data.multilabel,
            'has_test': test_data is not None,
            'chexpert': data.origin.get('chexpert', {}),
            'data_dir': str(Path(args.data_dir).resolve()),
            'data': args.data if args.data in REAL else str(Path(args.data).resolve())}})
    if args.quick:
        print('this was --quick: the pipeline works, the result means little')
    print(f'next: python evaluate.py {shlex.quote(str(folder))}')


if __name__ == '__main__':
    sys.exit(main())
