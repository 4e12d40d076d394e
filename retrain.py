"""Train the network of a genotype from scratch: on CIFAR, or on anything a search can run on.

    python retrain.py --arch DARTS_V2 --data cifar10 --auxiliary --cutout --gpu 0   # 600 epochs
    python retrain.py --arch runs/NAME --data cifar10 --auxiliary --cutout --gpu 0  # of a search
    python retrain.py --arch runs/NAME --data noise --gpu 0          # how well can it fit noise?
    python retrain.py --arch runs/NAME --data cifar10 --quick        # a minute on a CPU
    ... --resume                                                     # go on, or start

The last epoch's test error is the result. Recipe: DARTS (arXiv 1806.09055), with cutout (arXiv
1708.04552), an auxiliary head (arXiv 1409.4842) and drop-path (arXiv 1605.07648).
"""
import math
import shlex
import sys
import time
from pathlib import Path

from evaluate import (GraphedStep, Running, add_run_flags, changed_by_a_step, check_finite,
                      check_rates, correct, find_genotype, load_states, loss_of, open_run,
                      peak_memory_mib, random_states, run_name, save_file, shortened, test,
                      write_log)
from generate_data import (CIFAR, Batches, Parser, Progress, UserError, choose_device,
                           find_or_make, number, one_line_errors, read)
from model_search import Network

import numpy as np
import torch

DEFAULTS = dict(epochs=600, batch_size=96, learning_rate=0.025, learning_rate_min=0.0)
QUICK = dict(num_images=1000, epochs=2, steps_per_epoch=40, batch_size=32, init_channels=8,
             layers=5, learning_rate=0.05)
FIT_IMAGES = 10000          # training images on which the fit is measured at the end
EVALUATION_BATCH = 250      # changes no result: in evaluation mode images do not meet


def train_step(network, batch, sgd, args):
    """One step of the weights; returns (loss without the auxiliary head's, right answers)."""
    x, y = batch
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        logits = network(x)
    logits, auxiliary_logits = logits if args.auxiliary else (logits, None)
    loss = total = loss_of(logits.float(), y)
    if args.auxiliary:
        total = loss + args.auxiliary_weight * loss_of(auxiliary_logits.float(), y)
    total.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), args.grad_clip, foreach=True)
    sgd.step()
    sgd.zero_grad()
    return loss.detach(), correct(logits.detach(), y)


def optimizer(network, args):
    """SGD whose learning rate is a tensor, so that a CUDA graph sees it change."""
    device = next(network.parameters()).device
    return torch.optim.SGD(network.parameters(), torch.tensor(args.learning_rate, device=device),
                           momentum=args.momentum, weight_decay=args.weight_decay,
                           fused=device.type == 'cuda', foreach=device.type != 'cuda')


def parse(argv):
    """Settings: what was given, else --quick's, else DARTS's."""
    parser = Parser(prog='retrain.py', description=__doc__.split('\n')[0])
    group = parser.add_argument_group('network')
    group.add_argument('--arch', required=True,
                       help='a published name, a genotype.json or the folder of a search')
    group.add_argument('--init_channels', type=number(int, 1, 4096), default=36)
    group.add_argument('--layers', type=number(int, 1, 200), default=20, help='cells')
    group.add_argument('--auxiliary', action='store_true', help='a second head while training')
    group.add_argument('--auxiliary_weight', type=number(float, 0), default=0.4)
    group.add_argument('--drop_path_prob', type=number(float, 0, 1, open_high=True), default=0.2,
                       help='reached linearly at the end')
    group.add_argument('--cutout', action='store_true')
    group.add_argument('--cutout_length', type=number(int, 1), default=16, help='pixels')
    add_run_flags(parser, 'cifar10', DEFAULTS)
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.max_steps == 0:
        raise UserError('--max_steps 0: nothing would be trained; take 1 or more')
    check_rates(args, sys.argv[1:] if argv is None else argv)
    defaults = vars(parser.parse_args(['--arch', args.arch]))
    args.save = args.save or run_name('retrain', args, defaults)
    return args


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = choose_device(args.gpu, args.tf32)
    genotype, found_by = find_genotype(args.arch)
    data = find_or_make(args)
    if args.auxiliary and data.image_size < 29:
        raise UserError(f'--auxiliary needs images of 29 px or more, not {data.image_size}: leave '
                        'it out')
    cutout = args.cutout_length if args.cutout else 0
    batches = Batches(data, range(len(data)), args.batch_size, device, args.augment, cutout,
                      2 * args.seed, workers=args.workers)
    chosen = np.linspace(0, len(data) - 1, min(len(data), FIT_IMAGES)).astype(int)
    fit_batches = Batches(data, chosen, EVALUATION_BATCH, device, shuffle=False,
                          workers=args.workers)
    test_data, test_batches = None, None
    if data.kind == 'real':
        test_data = read(args.data, args.data_dir, 'test', args.image_size)
    if test_data:
        test_batches = Batches(test_data, range(len(test_data)), EVALUATION_BATCH, device,
                               shuffle=False, workers=args.workers)
    epochs, steps, total = shortened(args, len(batches))

    run = open_run(args, device)
    if run is None:
        return
    folder, checkpoint = run

    torch.manual_seed(args.seed)
    network = Network(args.init_channels, len(data.classes), args.layers, genotype,
                      auxiliary=args.auxiliary).to(device)
    sgd = optimizer(network, args)
    if args.drop_path_prob:
        network.drop_path_prob = torch.zeros((), device=device)
    start, start_step, seconds, best = 0, 0, 0.0, math.inf
    sums = torch.zeros(2, device=device)                    # loss and right answers
    if checkpoint:
        start, start_step, seconds, best = load_states(
            checkpoint, folder / 'checkpoint.pt', ('epoch', 'step', 'seconds', 'best'),
            network=network, sgd=sgd)
        sums = checkpoint['sums'].to(device)
    rate = sgd.param_groups[0]['lr'] = sgd.param_groups[0]['lr'].to(device)
    graphed = GraphedStep(lambda *batch: torch.stack(train_step(network, batch, sgd, args)),
                          lambda: changed_by_a_step(network, sgd), device, args.graph == 'auto')

    def save(epoch, step):
        save_file(folder / 'checkpoint.pt', {
            'network': network.state_dict(), 'sgd': sgd.state_dict(), 'epoch': epoch,
            'step': step, 'sums': sums, 'seconds': seconds, 'best': best,
            'random': random_states(device)})

    print(f'{args.arch} on {data.name} ({len(data):,} images of {data.image_size} px, '
          f'{len(data.classes)} classes), {total:,} steps on {device}, in {folder}')
    progress = Progress(total, 'steps', min(start * steps + start_step, total))
    with Running(folder) as stop:
        for epoch in range(start, epochs):
            learning_rate = args.learning_rate_min + (
                args.learning_rate - args.learning_rate_min) * (
                    1 + math.cos(math.pi * epoch / epochs)) / 2
            rate.fill_(learning_rate)
            drop_path_prob = args.drop_path_prob * epoch / epochs
            if drop_path_prob:
                network.drop_path_prob.fill_(drop_path_prob)
            network.train()
            last = min(steps, total - epoch * steps)
            began = saved = time.time()
            for step, batch in zip(range(start_step, last), batches.epoch(epoch, start_step)):
                sums += graphed(*batch)
                progress.update(epoch * steps + step + 1, f'epoch {epoch + 1}/{epochs}')
                # A look at the sums makes a GPU wait: there it is not taken at every step.
                due = stop or time.time() - saved > 60 * args.checkpoint_minutes
                if due or device.type == 'cpu' or step % 50 == 49 or step + 1 == last:
                    check_finite([sums, *network.parameters()], folder, epoch * steps + step)
                if due and step + 1 < last:
                    saved, seconds = time.time(), seconds + time.time() - began
                    began = saved
                    save(epoch, step + 1)
                    if stop:
                        print(f'stopped and saved in {folder}: run the same with --resume')
                        return 128 + stop.signal
            seconds += time.time() - began
            train_loss, right = (sums / last).tolist()
            line = {'epoch': epoch, 'learning_rate': learning_rate,
                    'drop_path_prob': drop_path_prob, 'train_loss': train_loss,
                    'train_accuracy': right / args.batch_size, 'test_error': None,
                    'test_loss': None, 'best_test_error_selected_on_test': None}
            if test_batches:
                score = test(network, test_batches)
                line['test_error'], line['test_loss'] = 100 * (1 - score['top1']), score['loss']
                best = min(best, line['test_error'])
                line['best_test_error_selected_on_test'] = best
            if epoch + 1 == epochs:             # without augmentation, in evaluation mode
                fit = test(network, fit_batches)
                line.update(fit_loss=fit['loss'], fit_accuracy=fit['top1'], fit_images=fit['n'])
            measured = [line[k] for k in ('test_loss', 'fit_loss') if line.get(k) is not None]
            check_finite([torch.tensor(measured or [0.0])], folder, epoch * steps + last)
            write_log(folder, {
                **line, 'seconds': round(seconds, 3),
                'images_per_second': round(last * args.batch_size / seconds, 1),
                'peak_memory_mib': peak_memory_mib(device)})
            sums, start_step, seconds = torch.zeros_like(sums), 0, 0.0
            save(epoch + 1, 0)
            if stop and epoch + 1 < epochs:
                print(f'stopped and saved in {folder}: run the same with --resume')
                return 128 + stop.signal
        progress.close()
        save_file(folder / 'weights.pt', {'network': network.state_dict(), 'meta': {
            'arch': args.arch, 'genotype': [list(part) for part in genotype],
            'found_by': found_by, 'init_channels': args.init_channels, 'layers': args.layers,
            'auxiliary': args.auxiliary, 'classes': data.classes, 'mean': data.mean,
            'std': data.std, 'image_size': data.image_size, 'multilabel': data.multilabel,
            'has_test': test_data is not None,
            'data_dir': str(Path(args.data_dir).resolve()),
            'data': args.data if args.data in CIFAR else str(Path(args.data).resolve())}})
    if args.quick:
        print('this was --quick: the pipeline works, the result means little')
    print(f'next: python evaluate.py {shlex.quote(str(folder))}')


if __name__ == '__main__':
    sys.exit(main())
