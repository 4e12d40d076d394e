"""Evaluate runs: what a search found and what it cost, what a retrained network is worth.

    python evaluate.py runs/NAME [runs/NAME ...]                  # one run, or a table of several
    python evaluate.py runs/retrain-* --csv table.csv
    python evaluate.py runs/search-* --plot curves.svg            # what the searches did, by epoch
    python evaluate.py --analysis runs/retrain-* --plot fit.svg   # expressivity and generalisation
    python evaluate.py --add study.csv runs/search-*              # finished searches into a CSV
    python evaluate.py --study study.csv --plot study.svg         # the study, from its CSV alone
    python evaluate.py --arch DARTS_V2 --cost --json              # parameters, multiply-adds

This file owns everything about a run on disk: its folder, log and checkpoints, metrics, tables and
plots. A retrained network is tested anew from its weights.pt; of a cell of NAS-Bench-201 the true
accuracy is looked up.
"""
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from argparse import BooleanOptionalAction
from bisect import bisect_left, bisect_right
from html import escape
from importlib.metadata import version
from pathlib import Path

# Before torch: generate_data sets how OpenMP's threads wait.
from generate_data import (CHEXPERT, REAL, SETTINGS, USED, Batches, Parser, UserError,
                           add_label_flags, auroc, choose_device, fcntl, locked, name_or_path,
                           number, one_line_errors, read, read_chexpert, used_settings, world,
                           write_file)

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from genotypes import (ACCURACIES, NB201_LARGEST, PUBLISHED, agreement, from_json, from_plain,
                       from_string, nas_bench_201, plain, truth)
from model_search import Network

# ---------------------------------------------------------------------------------------------
# Device, and the processes of torchrun


def averaged(tensors):
    """The mean over all processes of each of some tensors of one type, in one all_reduce."""
    if world()[1] == 1:
        return list(tensors)
    flat = torch.cat([t.detach().flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    parts = (flat / world()[1]).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors)]


def gathered(value):
    """[value of each process], of plain types and tensors on the CPU."""
    values = [None] * world()[1]
    if len(values) == 1:
        return [value]
    torch.distributed.all_gather_object(values, value)
    return values


def start_alike(network):
    """Every process takes the weights, alphas and statistics of the first."""
    if world()[1] > 1:
        for t in network.state_dict().values():
            torch.distributed.broadcast(t, 0)


def check_alike(tensors, what):
    """UserError where processes that do the same sums have come apart."""
    mine = torch.cat([t.detach().double().flatten() for t in tensors]).cpu()
    for rank, other in enumerate(gathered(mine)):
        if not torch.equal(other, mine):
            raise UserError(f'the {what} of process {rank} differ from those of {world()[0]}: use '
                            'one kind of GPU and one version of torch')


class GraphedStep:
    """A training step that CUDA replays as one graph, where that gives what the eager step gives.

    step(*batch) returns a tensor and changes the tensors in changed(), a dict of lists, in place.
    On CUDA with `on` the first calls are eager, then the step is captured and compared with the
    eager one from the same state on the same batch. Where capture fails, or a list changes by
    something else than in the eager step beyond TOLERANCE (a share of the change's norm), one
    line says why and the eager step goes on. Every call takes one step, whatever way it went.
    """
    WARM_UP, TOLERANCE = 3, 0.05

    def __init__(self, step, changed, device, on=True):
        self.step, self.changed, self.device = step, changed, device
        self.on, self.calls, self.graph = on and device.type == 'cuda', 0, None
        # One stream for eager steps and capture, as autograd keeps the stream it has met first.
        self.stream = torch.cuda.Stream(device) if self.on else None

    def __call__(self, *batch):
        self.calls += 1
        if self.graph is not None:
            torch._foreach_copy_(self.batch, list(batch))
            self.graph.replay()
            return self.result.clone()
        if not self.on:
            return self.step(*batch)
        with self.beside():
            if self.calls <= self.WARM_UP:
                return self.step(*batch)
            self.on = False
            return self.first_replay(batch)

    @contextlib.contextmanager
    def beside(self):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, batch):
        """(object with replay(), result): the step on `batch`, recorded but not run."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: a DataLoader's thread that pins memory must not break it off.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode='thread_local'):
            result = self.step(*batch)
        return graph, result

    def first_replay(self, batch):
        """Capture, compare, and leave the state one step further."""
        before = {name: [t.detach().clone() for t in part] for name, part in self.changed().items()}
        random = random_states(self.device)
        expected = self.step(*batch)
        ended = random_states(self.device)
        after = {name: [t.detach().clone() for t in part] for name, part in self.changed().items()}
        try:
            self.put(before, random)
            self.batch = [t.clone() for t in batch]
            graph, self.result = self.capture(self.batch)
            self.put(before, random)
            graph.replay()
            reason = self.difference(before, after)
        except RuntimeError as error:
            reason = f'capture failed ({str(error).splitlines()[0][:100]})'
            if self.device.type == 'cuda':      # before torch 2.14 it would count as capturing on
                generator = torch.cuda.default_generators[self.device.index]
                generator.graphsafe_set_state(generator.clone_state())
        if reason:
            for t in (t for part in self.changed().values() for t in part):
                t.grad = None                       # of a step that broke off
            self.put(after, ended)
            print(f'no CUDA graph: {reason}; going on without', file=sys.stderr)
            return expected
        self.graph = graph
        return self.result.clone()

    @torch.no_grad()
    def put(self, values, random):
        for name, part in self.changed().items():
            for t, value in zip(part, values[name]):
                t.copy_(value)
        torch.set_rng_state(random[0])
        for state in random[1:]:
            torch.cuda.set_rng_state(state, self.device)

    @torch.no_grad()
    def difference(self, before, after):
        """What the replay changed otherwise than the eager step did, or None."""
        def norm(pairs):
            return math.sqrt(sum((a.double() - b.double()).square().sum().item()
                                 for a, b in pairs))
        for name, part in self.changed().items():
            moved = norm(zip(after[name], before[name]))
            off = norm((t.detach(), value) for t, value in zip(part, after[name]))
            if not off <= self.TOLERANCE * moved:
                return f'the {name} differ from the eager step\'s by {off:.2g} in {moved:.2g}'
        return None


def changed_by_a_step(network, *optimizers):
    """What GraphedStep compares: {name: tensors}."""
    states = [t for optimizer in optimizers for state in optimizer.state.values()
              for t in state.values() if torch.is_tensor(t)]
    lists = {'weights': network.weight_parameters(), 'alphas': network.architecture_parameters(),
             'statistics': [b for b in network.buffers() if b.is_floating_point()],
             'optimizers': states}
    return {name: list(part) for name, part in lists.items() if part}


def hardware(device):
    """What a measured number was measured on."""
    cpu = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((ln.split(':')[1].strip() for ln in lines if ln.startswith('model name')), cpu)
    return {'cpu': cpu, 'threads': torch.get_num_threads(),
            'instructions': torch.backends.cpu.get_cpu_capability(),        # decide the last bits
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}


def peak_memory_mib(device):
    if device.type == 'cuda':
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    status = Path('/proc/self/status')          # getrusage's peak would be the parent's, if higher
    if status.exists():
        return round(int(status.read_text().split('VmHWM:')[1].split()[0]) / 1024)
    try:
        import resource
    except ImportError:                                                             # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)      # macOS: bytes


# ---------------------------------------------------------------------------------------------
# Run folder: args.json, log.jsonl, checkpoint.pt, scripts/, and the result of the run

# Settings that do not change a result, so that they may differ when a run is resumed.
FREE = {'save', 'resume', 'gpu', 'graph', 'workers', 'checkpoint_minutes', 'data_dir', 'download'}


def run_name(script, args, defaults):
    """Folder of a run under runs/: script, data, method or architecture, seed, and every other
    setting that is not its default."""
    def word(value):
        if not isinstance(value, str) or os.sep not in value:
            return f'{value:g}' if isinstance(value, float) else str(value).replace(' ', '_')
        path = Path(value).resolve()            # two folders of one name are two runs
        name = path.parent.name if path.name == 'genotype.json' else path.stem
        return f'{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}'.replace(' ', '_')
    main = {'data', 'method', 'arch', 'seed', 'source'}
    labelled = [word(args.source)] if args.data == 'random_labels' and args.source != 'cifar10' \
        else []                                 # whatever the preset takes by default
    other = [name if value is True else f'{name}={word(value)}'
             for name, value in sorted(vars(args).items())
             if name not in FREE | main and value != defaults.get(name)]
    parts = [script, word(args.data), *labelled, word(getattr(args, 'method', None) or args.arch),
             f'seed{args.seed}', *other]
    name = '-'.join(parts)
    if len(name) > 200:                         # file systems end at 255
        name = f'{name[:190]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}'
    return str(Path('runs') / name)


def open_run(args, device):
    """(folder, checkpoint or None) of a run that starts or goes on; None for one that is done.

    Of several processes the first makes the folder, and the others wait for it.
    """
    folder = Path(args.save)
    if not world()[0]:
        make_run(folder, args, device)
    if world()[1] > 1:
        torch.distributed.barrier()
    if finished(folder):
        print(f'{folder} is finished')
        return None
    checkpoint = None
    if (folder / 'checkpoint.pt').exists():
        checkpoint = load_file(folder / 'checkpoint.pt', 'delete it to start the run again')
    return folder, checkpoint


def finished(folder):
    """Whether the run in a folder has ended: its result, which is written last, is there."""
    return any((folder / name).exists() for name in ('genotype.json', 'weights.pt'))


def make_run(folder, args, device):
    """The folder with args.json and the scripts; UserError for one that is not of these args."""
    settings = vars(args)
    if (folder / 'args.json').exists():
        if not args.resume:
            raise UserError(f'{folder} holds a run already: --resume it, or choose another --save')
        before = read_json(folder / 'args.json', 'settings')['settings']
        for name in sorted((settings.keys() | before.keys()) - FREE):
            if settings.get(name) != before.get(name):
                raise UserError(f'{folder} was run with --{name} {before.get(name)}, not '
                                f'{settings.get(name)}: give the same, or choose another --save')
    else:
        folder.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith('.') for path in folder.iterdir()):
            raise UserError(f'{folder} holds something that is no run: choose another --save')
        about = {'command': shlex.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]]),
                 'settings': settings, 'date': time.strftime('%Y-%m-%d'),
                 'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                              **{k: version(k) for k in ('torchvision', 'numpy', 'pillow')}},
                 'git_commit': git_commit(), 'hardware': hardware(device),
                 'world_size': world()[1]}
        write_file(folder / 'args.json', json.dumps(about, indent=1) + '\n')
    (folder / 'scripts').mkdir(exist_ok=True)
    for script in Path(__file__).resolve().parent.glob('*.py'):
        if not (folder / 'scripts' / script.name).exists():
            write_file(folder / 'scripts' / script.name, script.read_bytes())


def add_run_flags(parser, data, presets):
    """The flags that search.py and retrain.py share; data: the default."""
    group = parser.add_argument_group('data')
    group.add_argument('--data', default=data, type=name_or_path,
                       help=f'noise, random_labels, generated, {", ".join(REAL)}, or a folder')
    group.add_argument('--image_size', type=number(int, 8, 4096),
                       help='pixels: 32 for noise; real images are resized to it')
    group.add_argument('--preset', choices=['auto', *presets], default='auto',
                       help='defaults of all settings; auto: by --data')
    group.add_argument('--stem', choices=['auto', 'cifar', 'imagenet'], default='auto',
                       help='one convolution, or three of stride 2; auto: these above 64 px')
    group.add_argument('--data_seed', type=number(int, 0, 2 ** 62), default=0,
                       help='of unreal data')
    group.add_argument('--augment', default='auto', help='auto: by the images, none for noise',
                       choices=['auto', 'none', 'standard', 'imagenet', 'affine', 'affine_flip'])
    group.add_argument('--workers', type=number(int, 0), default=2, help='of large data sets')
    add_label_flags(parser)
    group = parser.add_argument_group('schedule')
    group.add_argument('--epochs', type=number(int, 1))
    group.add_argument('--steps_per_epoch', type=number(int, 1), help='fewer than the data give')
    group.add_argument('--max_steps', type=number(int, 0),
                       help='steps in all; every schedule is scaled to them')
    group.add_argument('--batch_size', type=number(int, 2), help='of all processes together')
    group.add_argument('--grad_accum', type=number(int, 1), default=1,
                       help='parts in which a batch is computed, one at a time, to save memory')
    group.add_argument('--learning_rate', type=number(float, 0), help='of the weights')
    group.add_argument('--learning_rate_min', type=number(float, 0), help='at the end')
    group.add_argument('--schedule', choices=['cosine', 'linear'], default='cosine',
                       help='of the learning rate')
    group.add_argument('--warmup_epochs', type=number(int, 0), default=0,
                       help='in which the learning rate rises linearly')
    group.add_argument('--momentum', type=number(float, 0, 1, open_high=True), default=0.9)
    group.add_argument('--nesterov', action=BooleanOptionalAction, default=False,
                       help="Nesterov's momentum; in nb201 by default")
    group.add_argument('--weight_decay', type=number(float, 0), default=3e-4)
    group.add_argument('--grad_clip', type=number(float, 0, open_low=True), default=5.0,
                       help='largest norm of the gradient of the weights')
    group = parser.add_argument_group('run')
    group.add_argument('--gpu', type=number(int, -1), default=0, help='CUDA device, -1: CPU')
    group.add_argument('--seed', type=number(int, 0, 2 ** 62), default=0)
    group.add_argument('--save', help='run folder; by default named after the settings')
    group.add_argument('--resume', action='store_true', help='go on, or start if there is nothing')
    group.add_argument('--checkpoint_minutes', type=number(float, 0), default=10.0,
                       help='between checkpoints within an epoch')
    group.add_argument('--amp', action='store_true', help='bf16 autocast')
    group.add_argument('--tf32', action='store_true', help='TF32 products on CUDA')
    group.add_argument('--graph', choices=['auto', 'off'], default='auto',
                       help='replay the step as a CUDA graph, where that gives the same')
    group.add_argument('--quick', action='store_true',
                       help='a minute on two cores; the result means nothing')


def preset_of(args, presets):
    """The settings of --preset that the data of these args take."""
    name = args.preset
    if name == 'auto':
        data = args.source if args.data == 'random_labels' else args.data
        name = data if data in presets else 'cifar'
    used = used_settings(args, args.data)
    return {key: value for key, value in presets[name].items()
            if key not in SETTINGS or key in used}


def learning_rate_at(args, epoch, epochs):
    """Of an epoch: a linear rise, then a fall to learning_rate_min; constant within an epoch."""
    rise = round(args.warmup_epochs * epochs / args.epochs)
    if epoch < rise:
        return args.learning_rate * (epoch + 1) / rise
    done = (epoch - rise) / (epochs - rise)
    left = 1 - done if args.schedule == 'linear' else (1 + math.cos(math.pi * done)) / 2
    return args.learning_rate_min + (args.learning_rate - args.learning_rate_min) * left


def stem_of(args, image_size):
    """'cifar' or 'imagenet' for --stem; UserError where it leaves too few pixels."""
    stem = args.stem if args.stem != 'auto' else 'imagenet' if image_size > 64 else 'cifar'
    auxiliary = getattr(args, 'auxiliary', False)
    least = {'cifar': (8, 29), 'imagenet': (32, 193)}[stem][auxiliary]
    if stem == 'imagenet' and args.init_channels == 1:
        raise UserError('--init_channels 1 are too few for --stem imagenet, which halves them: '
                        'take 2 or more')
    if image_size < least:
        raise UserError(f'{image_size} px are too few for --stem {stem}'
                        f'{" with --auxiliary" * auxiliary}: {least} or more are needed')
    return stem


def check_schedule(args, given, rate_for=None):
    """Bring batches and learning rates into order, or say what cannot be.

    rate_for: the batch for which a default learning rate is published, and with which it scales. A
    default of its end gives way to a lower start, a given one does not.
    """
    if rate_for and not any(word.split('=')[0] == '--learning_rate' for word in given):
        args.learning_rate *= args.batch_size / rate_for
    parts = args.grad_accum * int(os.environ.get('WORLD_SIZE', 1))
    if args.batch_size % parts or args.batch_size // parts < 2:
        raise UserError(f'--batch_size {args.batch_size} makes no {parts} parts of two images or '
                        'more (--grad_accum times the processes): take a multiple')
    if args.nesterov and not args.momentum:
        raise UserError('--momentum 0 goes without Nesterov: add --no-nesterov')
    if args.warmup_epochs >= args.epochs:
        raise UserError(f'--warmup_epochs {args.warmup_epochs} leaves none of {args.epochs} '
                        'epochs: take fewer')
    if args.learning_rate_min > args.learning_rate:
        if any(word.split('=')[0] == '--learning_rate_min' for word in given):
            raise UserError(f'--learning_rate_min {args.learning_rate_min} is more than '
                            f'--learning_rate {args.learning_rate}: give one that is less')
        args.learning_rate_min = args.learning_rate


def shortened(args, full):
    """(epochs, steps per epoch, steps in all) of a run whose data give `full` steps an epoch.

    Without --steps_per_epoch, --max_steps shortens the epochs and not their number, so that
    everything that goes by epochs keeps its shape. --quick takes what the data give.
    """
    steps, total = args.steps_per_epoch or full, args.max_steps
    if steps > full and not args.quick:
        raise UserError(f'--steps_per_epoch {steps}: the data give {full} steps of '
                        f'--batch_size {args.batch_size}; take as many at most')
    steps = min(steps, full)
    if total is not None and not args.steps_per_epoch:
        steps = min(full, max(1, math.ceil(total / args.epochs)))
    total = args.epochs * steps if total is None else min(total, args.epochs * steps)
    return math.ceil(total / steps), steps, total


def git_commit():
    root = Path(__file__).resolve().parent
    try:
        out = subprocess.run(['git', '-C', root, 'describe', '--always', '--dirty', '--abbrev=12'],
                             capture_output=True, text=True, timeout=10)
        return out.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def drop_torn_line(path):
    """A run killed while it wrote a line leaves it without an end."""
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b'\n'):
            write_file(path, text[:text.rfind(b'\n') + 1])


def write_log(folder, line):
    """Append a line, a dict with 'epoch', to log.jsonl; an epoch that is there already stays."""
    path = folder / 'log.jsonl'
    if world()[0]:
        return
    lines = read_log(folder, 'epoch')
    if lines and lines[-1]['epoch'] >= line['epoch']:
        return
    with open(path, 'a') as file:
        file.write(json.dumps(line) + '\n')
        file.flush()
        os.fsync(file.fileno())


def load_file(path, mend):
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(content, dict):
            raise ValueError('no dictionary')
        return content
    except Exception as error:
        reason = str(error).splitlines()[0][:100] if str(error) else 'truncated'
        raise UserError(f'{path} is not readable ({reason}): {mend}') from None


def load_states(checkpoint, path, counters, **objects):
    """Load a checkpoint into networks and optimizers, and torch's random state.

    Returns the values of `counters`, names of numbers in it.
    """
    try:
        for name, target in objects.items():
            for group in checkpoint[name].get('param_groups', ()):  # what suits this device
                group.update({key: target.defaults[key] for key in (
                    'foreach', 'fused', 'capturable') if key in target.defaults})
            target.load_state_dict(checkpoint[name])
        random = checkpoint['random'][world()[0] % len(checkpoint['random'])]
        torch.set_rng_state(random[0])
        if torch.cuda.is_available() and len(random) > 1:
            torch.cuda.set_rng_state(random[1])
        checkpoint['sums'].to('cpu')
        return [checkpoint[name] + 0 for name in counters]
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        raise UserError(f'{path} belongs to another network or method: delete it to start the run '
                        'again') from None


def own_sums(sums):
    """This process's row of those in a checkpoint; their mean where there were more or fewer."""
    rank, processes = world()
    return sums[rank] if len(sums) == processes else sums.mean(0)


def random_states(device):
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device)] if device.type == 'cuda' else states


def check_finite(tensors, folder, step):
    """Stop a run whose losses, weights or alphas are not finite, before it is saved."""
    norms = torch._foreach_norm([t.detach() for t in tensors])
    if not torch.stack([n.float() for n in norms]).isfinite().all():
        last = folder / 'checkpoint.pt'
        raise UserError(f'the loss or a weight is not finite at step {step}: lower --learning_rate'
                        + (f'; {last} is from before' if last.exists() else ''))


class Running:
    """Holds a run folder for this run, keeps its time, and says when the loop is to save.

    Ctrl-C and SIGTERM become a flag (`if running:` one came), so as to save before the end. With
    several processes all of them save and stop at the same step.
    """
    def __init__(self, folder, device, minutes=10.0):
        self.folder, self.device, self.minutes = folder, device, minutes

    def __enter__(self):
        if not world()[0]:
            self.lock = open(self.folder / '.lock', 'a')
            try:
                if fcntl:
                    fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.lock.close()
                raise UserError(f'{self.folder} is being run by another process: wait for it, or '
                                'choose another --save') from None
            if finished(self.folder):
                self.lock.close()
                raise UserError(f'{self.folder} was finished by another process just now')
            for left in self.folder.glob('.*.tmp'):     # of runs that were killed as they wrote
                left.unlink(missing_ok=True)
            if not (self.folder / 'checkpoint.pt').exists():
                (self.folder / 'log.jsonl').unlink(missing_ok=True)     # of a run that starts again
            drop_torn_line(self.folder / 'log.jsonl')
        self.signal, self.heard, self.before = None, None, {}
        for number_ in (signal.SIGINT, signal.SIGTERM):
            self.before[number_] = signal.signal(number_, self.catch)
        return self

    def catch(self, number_, _frame):
        if self.signal:                         # a second one ends the run at once
            raise KeyboardInterrupt
        self.signal = number_

    def __exit__(self, *_):
        for number_, handler in self.before.items():
            signal.signal(number_, handler)
        if not world()[0]:
            self.lock.close()

    def __bool__(self):
        return (self.signal if world()[1] == 1 else self.heard) is not None

    def epoch(self, seconds, steps_before):
        """An epoch begins, after `steps_before` of the run, or goes on after `seconds` of it."""
        self.saved, self.steps_before = time.time(), steps_before
        self.began = self.saved - seconds

    @property
    def seconds(self):
        """Of the epoch so far."""
        return time.time() - self.began

    def is_to_save(self, tensors, step, last):
        """Whether to save after this step, the `last` of its epoch apart; tensors: what to check.

        A look at tensors makes a GPU wait: there it is not taken at every step.
        """
        alone = world()[1] == 1
        due = alone and (self or time.time() - self.saved > 60 * self.minutes)
        if not (due or self.device.type == 'cpu' or step % 50 == 49 or step + 1 == last):
            return False
        check_finite(tensors, self.folder, self.steps_before + step)
        if not alone:
            flags = torch.tensor([self.signal or 0, time.time() - self.saved], device=self.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            received, waited = flags.tolist()
            self.heard = int(received) or None      # by any process, and now by all
            due = self or waited > 60 * self.minutes
        if due:
            self.saved = time.time()
        return due and step + 1 < last

    def stopped(self):
        """Say that the run stopped; returns its exit status."""
        print(f'stopped and saved in {self.folder}: run the same with --resume')
        return 128 + (self.signal or self.heard)


def read_json(path, *keys):
    """The object in a JSON file; each of the keys must hold an object of its own."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or not all(isinstance(content[k], dict) for k in keys):
            raise ValueError
        return content
    except FileNotFoundError:
        raise UserError(f'{path} is missing: not a run folder?') from None
    except (ValueError, KeyError):
        raise UserError(f'{path} is truncated or not what it should be: take it from a copy, or '
                        'run again') from None


def read_log(folder, *keys, torn=False):
    """The lines of log.jsonl, objects with the keys; [] where there is none.

    torn: whether an end without a line break is left out, as a run does that goes on.
    """
    path, lines = Path(folder) / 'log.jsonl', []
    try:
        text = path.read_text() if path.exists() else ''
        for line in text[:text.rfind('\n') + 1 if torn else None].splitlines():
            lines.append(None)
            lines[-1] = json.loads(line)
            for key in keys:
                lines[-1][key]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path}: line {max(1, len(lines))} is broken: --resume the run, which '
                        'mends a torn end, or run it again') from None
    return lines


# ---------------------------------------------------------------------------------------------
# Loss and metrics


def loss_of(logits, y, smoothing=0.0):
    """Cross-entropy for classes y (B,), binary cross-entropy for labels y (B, classes).

    Labels below 0 are unknown and add nothing; the sum is still divided by all B * classes, so
    that the mean over parts of a batch is that of the batch.
    """
    if y.dim() == 1:
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(logits, y.clamp(min=0), (y >= 0).to(logits.dtype))


def correct(logits, y, k=1):
    """How many of a batch are right, among the k best; the share of right labels for y (B, K).

    A tensor on the device: reading it is left to the caller, who knows when.
    """
    if y.dim() == 2:
        return ((logits > 0) == (y > 0.5)).float().mean(1).sum()
    best = logits.topk(min(k, logits.shape[1]), 1).indices
    return (best == y.unsqueeze(1)).any(1).float().sum()


@torch.no_grad()
def test(network, batches):
    """{'loss', 'top1', 'top5', 'n'} of a network in evaluation mode; shares from 0 to 1.

    For several labels instead of top1 and top5 `scores`: float64 (n, classes), and `rows`, the
    images that they are of. Every process tests a share of the images, each image once.
    """
    network.eval()
    sums, scores = torch.zeros(4, dtype=torch.float64), []
    for x, y in batches.epoch():
        logits = network(x)
        sums += torch.tensor([loss_of(logits, y) * len(y), correct(logits, y),
                              correct(logits, y, 5), len(y)])
        if y.dim() == 2:
            scores.append(logits.double().cpu())
    sums = torch.stack(gathered(sums)).sum(0)
    loss, top1, top5 = (sums[:3] / sums[3]).tolist()
    if not batches.data.multilabel:
        return {'loss': loss, 'top1': top1, 'top5': top5, 'n': int(sums[3])}
    scores, rows = (np.concatenate(gathered(part)) for part in (
        torch.cat(scores).numpy(), batches.indices))
    return {'loss': loss, 'scores': scores, 'rows': rows, 'n': int(sums[3])}


# The five observations of CheXpert's competition (arXiv 1901.07031)
TASKS = ['Atelectasis', 'Cardiomegaly', 'Consolidation', 'Edema', 'Pleural Effusion']


def by_study(scores, labels, studies, pooling='max'):
    """(scores, labels) of studies: the largest, or mean, score over a study's views, and any label.

    scores, labels: (n, classes), studies: (n,) or None, where each image is one.
    """
    if studies is None:
        return scores, labels
    _, whose = np.unique(studies, return_inverse=True)
    out, known = np.full((whose.max() + 1, scores.shape[1]), -np.inf), np.bincount(whose)[:, None]
    if pooling == 'max':
        np.maximum.at(out, whose, scores)
    else:
        out = np.zeros_like(out)
        np.add.at(out, whose, scores)
        out /= known
    any_label = np.full(out.shape, -1)
    np.maximum.at(any_label, whose, labels)
    return out, any_label


def areas(scores, labels, names, draws=0):
    """AUROC by label, their means, and what is not defined: where all or no images have a label.

    Returns {'auroc': {name: value}, 'auroc_mean', 'auroc_tasks': mean over TASKS where there are
    such, 'undefined': names}; with `draws`, '..._interval' of both means, 95%, by bootstrap over
    the rows, which are studies. Labels below 0 are unknown.
    """
    def means(rows):
        values = {name: auroc(scores[rows, k][labels[rows, k] >= 0],
                              labels[rows, k][labels[rows, k] >= 0] == 1)
                  for k, name in enumerate(names)}
        known = {name: value for name, value in values.items() if value is not None}
        tasks = [known[name] for name in TASKS if name in known] or list(known.values())
        return known, (float(np.mean(list(known.values()))) if known else None,
                       float(np.mean(tasks)) if known else None)
    known, (mean, tasks) = means(np.arange(len(labels)))
    out = {'auroc': known, 'auroc_mean': mean, 'auroc_tasks': tasks,
           'undefined': [name for name in names if name not in known]}
    if draws and known:
        rng = np.random.Generator(np.random.Philox(0))
        drawn = [means(rng.integers(0, len(labels), len(labels)))[1] for _ in range(draws)]
        for k, name in enumerate(('auroc_mean', 'auroc_tasks')):
            values = [pair[k] for pair in drawn if pair[k] is not None]
            out[name + '_interval'] = np.percentile(values, [2.5, 97.5]).tolist()
    return out


def wilson(share, n):
    """95% interval of a share of n (Wilson 1927)."""
    z = 1.959964
    middle, width = share + z * z / (2 * n), z * math.sqrt(
        share * (1 - share) / n + z * z / (4 * n * n))
    return [(middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)]


# Student's t, 97.5%, for 1 to 30 degrees of freedom
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
     2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
     2.052, 2.048, 2.045, 2.042]


def mean_std_interval(values):
    """(mean, standard deviation, 95% t-interval) of a list; None for what n = 1 does not give."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, None, None
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    t = T[n - 2] if n - 1 <= len(T) else 1.96 + 2.45 / (n - 1)
    return mean, std, [mean - t * std / math.sqrt(n), mean + t * std / math.sqrt(n)]


# ---------------------------------------------------------------------------------------------
# Architectures and networks


def find_genotype(arch):
    """(genotype, where it came from) of a published name, a string, a genotype.json or a search."""
    if arch in PUBLISHED:
        return PUBLISHED[arch], {'data': 'published', 'method': arch}
    if arch.startswith('|'):
        try:
            return from_plain(arch, '--arch'), {'data': 'given', 'method': 'given'}
        except ValueError as error:
            raise UserError(str(error)) from None
    path = Path(arch)
    if path.is_dir():
        if (path / 'args.json').exists() and 'arch' in read_json(path / 'args.json',
                                                                 'settings')['settings']:
            raise UserError(f'--arch {arch} is a retrained network: give the search it came from')
        path = path / 'genotype.json'
        if not path.exists():
            raise UserError(f'{path} is missing: the search in {arch} has not ended; --resume it')
    if not path.is_file():
        raise UserError(f'--arch {arch}: neither a file, nor a run, nor one of '
                        f'{", ".join(PUBLISHED)}')
    fields = read_json(path)
    try:
        genotype = from_json(fields, str(path))
    except ValueError as error:
        raise UserError(str(error)) from None
    return genotype, {key: fields.get(key) for key in ('data', 'method', 'seed', 'arch_data')}


def check_layers(genotype, layers):
    """UserError where a network of NAS-Bench-201 would have no three equal stages."""
    if isinstance(genotype, str) and (layers < 5 or layers % 3 != 2):
        raise UserError(f'--layers {layers}: three stages of N cells of NAS-Bench-201 and two '
                        'blocks between are 3 N + 2: take 5, 8, 11, 14, 17, ...')


def cost(genotype, init_channels=36, layers=20, num_classes=10, image_size=32, stem='cifar'):
    """Parameters without and with the auxiliary head, and multiply-adds of one image.

    Multiply-adds are those of convolutions and linear layers, without the auxiliary head.
    """
    with torch.device('meta'):
        network = Network(init_channels, num_classes, layers, genotype, auxiliary=True,
                          stem=stem).eval()
        image = torch.empty(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    params = sum(p.numel() for p in network.parameters())
    head = sum(p.numel() for p in network.auxiliary_head.parameters())
    return {'params': params - head, 'params_auxiliary': params,
            'multiply_adds': counter.get_total_flops() // 2}


def widest(genotype, limit, layers, num_classes, image_size, stem):
    """The most channels C with which a derived network has at most `limit` multiply-adds."""
    def fits(channels):
        return cost(genotype, channels, layers, num_classes, image_size,
                    stem)['multiply_adds'] <= limit
    if not fits(2):
        raise UserError(f'--max_multiply_adds {limit:g} is less than two channels need: raise it')
    low, high = 2, 4
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def load_weights(path):
    """(network in evaluation mode, meta) from a weights.pt.

    meta: classes, mean and std (3,) as shares of 255, image_size, multilabel, arch, found_by.
    """
    content = load_file(path, 'retrain again')
    try:
        meta = content['meta']
        genotype = from_plain(meta['genotype'], str(path))
        network = Network(meta['init_channels'], len(meta['classes']), meta['layers'], genotype,
                          auxiliary=meta['auxiliary'], stem=meta['stem'])
        network.load_state_dict(content['network'])
        assert meta['image_size'] + 0 and {'data', 'method'} <= meta['found_by'].keys()
        assert {'arch', 'has_test', 'data_dir'} <= meta.keys()
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        raise UserError(f'{path} holds no network of retrain.py: retrain again') from None
    return network.eval(), meta


# ---------------------------------------------------------------------------------------------
# Reports


def report(run, data_dir=None, device=None, batch_size=250, test_labels=None, pooling='max'):
    """What there is to say of one run, as a dict; a retrained network is tested.

    test_labels: a CSV of CheXpert's test set, which then takes the place of valid.csv; pooling:
    how the scores of a study's views become one.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f'{run}: no such run folder')
    about = read_json(folder / 'args.json', 'settings', 'hardware')
    settings = about['settings']
    if 'method' in settings:
        return report_search(folder, about)
    if not (folder / 'weights.pt').exists():
        raise UserError(f'{folder}/weights.pt is missing: the run has not ended; --resume it')
    network, meta = load_weights(folder / 'weights.pt')
    log, found_by = read_log(folder, 'seconds', 'train_loss', 'train_accuracy'), meta['found_by']
    last = log[-1] if log else {}
    area = sum(line['train_accuracy'] for line in log) / len(log) if log else None
    noise = settings['label_noise'] if settings['data'] == 'random_labels' else 1
    out = {'run': str(folder), 'type': 'retrain', 'arch': meta['arch'],
           'searched_on': found_by['data'], 'method': found_by['method'],
           'arch_data': found_by.get('arch_data'),
           'data': settings['data'] + f' {noise:g}' * (noise < 1), 'seed': settings['seed'],
           'settings': settings,
           **{key: last.get(key) for key in ('train_loss', 'train_accuracy', 'fit_loss',
                                             'fit_accuracy')},
           'test_error': None, 'top1': None, 'top5': None, 'top1_interval': None,
           'top5_interval': None,
           'genotype': meta['genotype'], 'train_area': area,
           **cost(from_plain(meta['genotype']), meta['init_channels'], meta['layers'],
                  len(meta['classes']), meta['image_size'], meta['stem']),
           'seconds': sum(line['seconds'] for line in log)}
    if test_labels:
        if meta['classes'] != list(CHEXPERT):
            raise UserError(f'--test_labels {test_labels}: {folder} was not trained on chexpert: '
                            'leave it out')
        data = read_chexpert(data_dir or meta['data_dir'], 'test', meta['image_size'],
                             **meta['chexpert'], table=test_labels)
    elif meta['has_test']:
        moved = data_dir and settings['data'] not in REAL
        data = read(data_dir if moved else meta.get('data', settings['data']),
                    data_dir or meta['data_dir'], 'test', meta['image_size'], **meta['chexpert'])
    else:
        return out
    score = test(network.to(device), Batches(data, range(len(data)), batch_size, device,
                                             shuffle=False))
    out['test_images'] = score['n']
    if data.multilabel:
        pooled = by_study(score['scores'], data.labels[score['rows']],
                           None if data.studies is None else data.studies[score['rows']], pooling)
        return {**out, 'tested_on': test_labels or 'valid.csv', 'test_studies': len(pooled[0]),
                **areas(*pooled, meta['classes'], 1000)}
    out['test_error'] = 100 * (1 - score['top1'])
    for top in ('top1', 'top5') if len(meta['classes']) > 4 else ('top1',):
        out[top] = 100 * score[top]
        out[f'{top}_interval'] = [100 * bound for bound in wilson(score[top], score['n'])]
    return out


def report_search(folder, about):
    """Of a search; `log`, for agreements and plots, ends where the genotype was taken."""
    genotype, found_by = find_genotype(str(folder))
    settings, log = about['settings'], read_log(folder, 'seconds', 'epoch')
    stop = read_json(folder / 'genotype.json').get('early_stop')
    ended = stop['epoch'] if stop and settings.get('early_stop') else math.inf
    out = {'run': str(folder), 'type': 'search', 'space': settings.get('space', 'darts'),
           'searched_on': found_by['data'], 'method': method_of(settings),
           'arch_data': found_by['arch_data'], 'seed': settings['seed'],
           'genotype': plain(genotype), 'settings': settings}
    if isinstance(genotype, str):
        out.update(look_up(genotype))
    else:
        for cell in ('normal', 'reduce'):
            out[f'skips_{cell}'] = sum(op == 'skip_connect' for op, _ in getattr(genotype, cell))
        out['params'] = cost(genotype)['params']
    return {**out, 'epochs': len(log), 'seconds': sum(line['seconds'] for line in log),
            'device': about['hardware']['device'], 'date': about['date'],
            'log': [line for line in log if line['epoch'] <= ended]}


def method_of(settings):
    """The method of a search with what makes it another one."""
    return settings['method'] + ', second order' * settings.get('unrolled', False) \
        + ', adversarial' * (settings['method'] == 'sdarts' and settings['perturb'] != 'random') \
        + ', no steps' * (settings.get('max_steps') == 0)


def look_up(arch):
    """What is known of a cell of NAS-Bench-201, and how far it is from what it is measured by.

    Distances in points, for CIFAR-10, CIFAR-100 and ImageNet16-120: to the best cell, to the
    median, to the largest network, which a search must beat to have been of use.
    """
    table, ordered = nas_bench_201()
    names, true = from_string(arch), truth(arch)

    def beyond(values):
        return [round(true[name] - value, 2) for name, value in zip(ACCURACIES, values)]

    skips, nones = names.count('skip_connect'), names.count('none')
    return {**true, 'to_optimum': beyond(ordered[name][-1] for name in ACCURACIES),
            'to_median': beyond(ordered[name][len(table) // 2] for name in ACCURACIES),
            'to_largest': beyond(table[NB201_LARGEST][name] for name in ACCURACIES),
            'skips': skips, 'nones': nones, 'collapsed': skips + nones >= 4,
            'params': table[arch]['params']}


def show(row):
    """Print one report."""
    for key, value in row.items():
        if key == 'genotype' and isinstance(value, dict):
            for cell in ('normal', 'reduce'):
                print(f'  {cell:<14} ' + '  '.join(f'{op}:{state}' for op, state in value[cell]))
        elif value is not None and key != 'log':
            text = f'{value:,.4g}' if isinstance(value, float) else value
            if key in ('test_error', 'top1', 'top5', *ACCURACIES):
                text = f'{value:.2f}%'
            elif key == 'auroc':
                text = '  '.join(f'{name} {area:.3f}' for name, area in value.items())
            elif key.startswith('auroc_'):
                text = f'{value[0]:.3f} to {value[1]:.3f} (95%, bootstrap over studies)' \
                    if isinstance(value, list) else f'{value:.3f}'
            elif key.startswith('to_'):
                text = '  '.join(f'{points:+.2f}' for points in value)
            elif isinstance(value, list) and not key.endswith('_interval'):
                text = ', '.join(value) or '-'
            elif key.endswith('_interval'):
                text = f'{value[0]:.2f}% to {value[1]:.2f}% (95%, Wilson, {row["test_images"]:,} ' \
                       'test images)'
            elif isinstance(value, int) and key != 'seed' and not isinstance(value, bool):
                text = f'{value:,}'
            print(f'  {key:<14} {text}' if key != 'run' else value)


def groups(rows, *keys):
    """{values of some keys: the rows that have them}, in the order of the rows."""
    out = {}
    for row in rows:
        out.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return out


ONE_LINE = 'type', 'space', 'searched_on', 'method', 'arch_data', 'data'


def mixtures(rows):
    """Lines that say which settings, seeds apart, differ between runs that a table averages.

    Rows that were read from a file of --json have no settings, and are not compared.
    """
    out = []
    for key, members in groups(rows, *ONE_LINE).items():
        given = [row['settings'] for row in members if 'settings' in row]
        names = sorted(name for name in {name for settings in given for name in settings}
                       - FREE - {'seed', 'data_seed', 'arch'}
                       if any(settings.get(name) != given[0].get(name) for settings in given))
        if names:
            what = ' '.join(str(word) for word in key if word)
            out.append(f'{what}: averaged over runs that differ in {", ".join(names)}')
    return out


def table(rows):
    """Rows grouped by what was run, as a list of dicts: mean, deviation, interval of measures."""
    out = []
    for key, members in groups(rows, *ONE_LINE).items():
        line = {**dict(zip(ONE_LINE, key)), 'n': len(members)}
        line['trained_on'] = line.pop('data')
        for measure in MEASURES:
            values = [row[measure] for row in members if row.get(measure) is not None]
            if values:
                mean, std, interval = mean_std_interval(values)
                line.update({measure: mean, measure + '_median': float(np.median(values)),
                             measure + '_std': std, measure + '_low': interval and interval[0],
                             measure + '_high': interval and interval[1]})
        if any('collapsed' in row for row in members):
            line['collapsed'] = sum(row['collapsed'] for row in members)
        out.append(line)
    return out


# What tables say of runs: {measure: (header, scale, digits)}; a column that no run has is left out.
MEASURES = {'test_error': ('test error %', 1, 2), 'auroc_tasks': ('AUROC', 1, 3),
            'fit_accuracy': ('fit accuracy %', 100, 2), 'cifar10': ('CIFAR-10 %', 1, 2),
            'cifar100': ('CIFAR-100 %', 1, 2), 'imagenet16': ('ImageNet16 %', 1, 2),
            'percentile': ('percentile', 1, 1), 'skips': ('skips', 1, 2), 'nones': ('nones', 1, 2),
            'skips_normal': ('skips (normal)', 1, 2), 'params': ('params (M)', 1e-6, 3),
            'seconds': ('seconds', 1, 0)}
INTERVALS = 'test_error', 'auroc_tasks', 'fit_accuracy', 'percentile'


def show_table(lines):
    """Print a table: mean ± standard deviation [95% t-interval] for each group of runs."""
    def cell(line, name):
        _, scale, digits = MEASURES[name]
        if line.get(name) is None:
            return '-'
        text = f'{line[name] * scale:.{digits}f}'
        if line[name + '_std'] is not None:
            low, high = (line[name + end] * scale for end in ('_low', '_high'))
            text += f' ± {line[name + "_std"] * scale:.{digits}f}'
            text += f' [{low:.{digits}f}, {high:.{digits}f}]' if name in INTERVALS else ''
        if name == 'cifar10' and line['n'] > 2:
            text += f' median {line["cifar10_median"]:.{digits}f}'
        return text
    used = [name for name in MEASURES if any(line.get(name) is not None for line in lines)]
    about = [('run', 'type'), ('space', 'space'), ('searched on', 'searched_on'),
             ('method', 'method'), ('alphas on', 'arch_data'), ('trained on', 'trained_on'),
             ('n', 'n'), ('collapsed', 'collapsed')]
    about = [(title, key) for title, key in about if any(line.get(key) is not None
                                                         for line in lines)]
    columns([[title for title, _ in about] + [MEASURES[name][0] for name in used],
             *[['-' if line.get(key) is None else str(line[key]) for _, key in about]
               + [cell(line, name) for name in used] for line in lines]])


def columns(rows, bars=False):
    """Print lists of texts in columns, with bars as a table of Markdown."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in [rows[0], ['-' * width for width in widths], *rows[1:]] if bars else rows:
        texts = [text.ljust(width) for text, width in zip(row, widths)]
        print(f'| {" | ".join(texts)} |' if bars else '  '.join(texts).rstrip())


def true_by_epoch(rows, points=6):
    """Lists of texts: by group of searches, the mean true CIFAR-10 accuracy after some epochs.

    For analysis only: a search must not look at it.
    """
    logs = [row for row in rows if any('truth_for_analysis_only' in line for line in row['log'])]
    if not logs:
        return []
    last = max(len(row['log']) for row in logs)
    epochs = sorted({max(1, round(k * last / (points - 1))) for k in range(points)})
    out = [['searched on', 'method', 'alphas on', 'n', *(f'epoch {k}' for k in epochs)]]
    for key, members in groups(logs, 'searched_on', 'method', 'arch_data').items():
        known = [[row['log'][k - 1]['truth_for_analysis_only']['cifar10'] for row in members
                  if k <= len(row['log'])] for k in epochs]
        out.append([*key, str(len(members)),
                    *(f'{np.mean(values):.2f}' if values else '-' for values in known)])
    return out


def agreements(rows):
    """How much of what searches found goes back to the data, the seed, the method.

    Of pairs of runs in one space: [{'space', 'pairs', 'n', 'genotypes', 'alphas'}], means of the
    share of operations that two genotypes have in common (by chance .2 in NAS-Bench-201) and of
    the correlation of the probabilities of all operations on all edges. Other data are also other
    images that the alphas saw.
    """
    def probabilities(row):
        """All of them, less their mean and at length 1; None where they are all alike."""
        alphas = row['log'][-1].get('alphas') if row['log'] else None
        if alphas is None:
            return None
        p = np.concatenate([torch.softmax(torch.tensor(a).double(), 1).numpy().ravel()
                            for name, a in alphas.items() if not name.startswith('beta')])
        p -= p.mean()
        return p / np.linalg.norm(p) if np.abs(p).max() > 1e-12 else None

    found = {}
    known = [(row, from_plain(row['genotype']), probabilities(row)) for row in rows]
    for k, (a, first, p) in enumerate(known):
        for b, second, q in known[:k]:
            same_data = (a['searched_on'], a['arch_data']) == (b['searched_on'], b['arch_data'])
            same_method = a['method'] == b['method']
            if a['space'] != b['space'] or not (same_data or same_method):
                continue
            kind = 'other method, same data' if not same_method else \
                'same method, same data (seeds)' if same_data else 'same method, other data'
            alike = None if p is None or q is None else float(p @ q)
            found.setdefault((a['space'], kind), []).append((agreement(first, second), alike))
    out = []
    for (space, kind), pairs in found.items():
        alike = [v for _, v in pairs if v is not None]
        out.append({'space': space, 'pairs': kind, 'n': len(pairs),
                    'genotypes': float(np.mean([v for v, _ in pairs])),
                    'alphas': float(np.mean(alike)) if alike else None})
    return out


# ---------------------------------------------------------------------------------------------
# Expressivity and generalisation

KNOWN = 'CIFAR-10, by NAS-Bench-201'        # a test error that is looked up
FITS = 'fit_loss', 'fit_accuracy', 'train_area'


def analysis(rows):
    """(expressivity, generalisation, correlations) of retrained networks.

    Grouped by where the architecture came from (search data, method; then all methods together).
    Expressivity, by the data that it was given: loss and accuracy on training images at the end,
    area under the curve of the training accuracy (its mean over epochs). Generalisation, on real
    data: test error and gap, the accuracy on training less that on test images, in points. n counts
    runs, which should be of one recipe.
    """
    fit, general = [], []
    found = groups(rows, 'searched_on', 'method', 'arch_data', 'data')
    for (data, alphas, given), members in groups(rows, 'searched_on', 'arch_data', 'data').items():
        if len({row['method'] for row in members}) > 1:
            found[data, 'all', alphas, given] = members
    for (data, method, alphas, given), members in found.items():
        origin = {'searched_on': data, 'method': method, 'arch_data': alphas,
                  'trained_on': given, 'n': len(members)}
        fit.append({**origin, **{name: mean_std_interval([row[name] for row in members])
                                 for name in FITS}})
        tested = [row for row in members if row['test_error'] is not None]
        if tested:
            gaps = [100 * row['fit_accuracy'] - row['top1'] for row in tested]
            general.append({**origin, 'test_error': mean_std_interval(
                [row['test_error'] for row in tested]), 'gap': mean_std_interval(gaps)})
    return fit, general, correlations(rows)


def read_reports(path):
    """Rows of retrained networks, as --json printed them, for --analysis without the runs."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        for row in rows:
            from_plain(row['genotype'])
            hash(tuple(row[key] for key in ('run', 'searched_on', 'method', 'arch_data', 'data')))
            numbers = [row[name] for name in (*FITS, 'params')]
            numbers += [row['top1'], row['test_error']] if row['test_error'] is not None else []
            if row['fit_accuracy'] is None:         # of several labels: main() says so
                numbers = []
            if row['type'] != 'retrain' or not math.isfinite(sum(numbers)):
                raise ValueError(f'{row["run"]} is no whole run of retrain.py')
        if not rows:
            raise ValueError('it is empty')
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{path}: not what --json prints of retrained networks ({error}): print '
                        'it again') from None
    return rows


def correlations(rows):
    """Spearman's, over architectures, of the fit to each kind of data and the test error.

    [{'fit_on', 'measure', 'tested_on', 'spearman', 'interval', 'given_params', 'n', 'points',
    'origins'}]: tested_on is real data on which they were trained too, or KNOWN, with which their
    own test error is compared as well; the number of parameters is what a measure has to beat, and
    given_params the partial correlation where it is held; origins are where the architecture of
    each point was found (first).
    """
    def mean(members, measure):
        return float(np.mean([row[measure] for row in members]))

    by_arch, tested, out = {}, {}, []
    for row in rows:
        arch = by_arch.setdefault(json.dumps(row['genotype']), {})
        arch.setdefault(row['data'], []).append(row)
        arch.setdefault(None, []).append(row)        # trained on whatever
    for name, arch in by_arch.items():
        for data, members in arch.items():
            members = [row for row in members if row['test_error'] is not None]
            if data and members:
                tested.setdefault(data, {})[name] = mean(members, 'test_error')
        if name.startswith('"|'):
            tested.setdefault(KNOWN, {})[name] = 100 - truth(json.loads(name))['cifar10']
    kinds = dict.fromkeys(row['data'] for row in rows)
    for data, errors in tested.items():
        found = [(kind, measure, {name: (mean(by_arch[name][kind], measure), error)
                                  for name, error in errors.items() if kind in by_arch[name]})
                 for kind, measure in [*itertools.product(kinds, FITS), (None, 'params')]]
        if data == KNOWN:
            found += [(kind, 'test_error', {name: (error, errors[name])
                                            for name, error in own.items() if name in errors})
                      for kind, own in tested.items() if kind != KNOWN]
        for kind, measure, points in found:
            if len(points) < 3:
                continue
            firsts = [by_arch[name][None][0] for name in points]
            x, y = zip(*points.values())
            size = [mean(by_arch[name][None], 'params') for name in points]
            value, n = spearman(x, y), len(points)
            partial = None if measure == 'params' else partial_correlation(
                value, spearman(x, size), spearman(y, size))
            out.append({'fit_on': kind, 'measure': measure, 'tested_on': data, 'spearman': value,
                        'interval': spearman_interval(value, n), 'given_params': partial, 'n': n,
                        'points': list(points.values()),
                        'origins': [row['searched_on'] or row['method'] for row in firsts]})
    return out


def ranks(values):
    """1 for the smallest; ties share the mean of their ranks."""
    ordered = sorted(values)
    return [(bisect_left(ordered, v) + bisect_right(ordered, v) + 1) / 2 for v in values]


def spearman(x, y):
    """Rank correlation; None where all values are the same."""
    x, y = np.array(ranks(x)), np.array(ranks(y))
    return float(np.corrcoef(x, y)[0, 1]) if x.std() * y.std() else None


def partial_correlation(xy, xz, yz):
    """Of x and y where z is held, from the three of pairs; None where it is not defined."""
    if None in (xy, xz, yz) or max(abs(xz), abs(yz)) > 1 - 1e-9:
        return None
    return (xy - xz * yz) / math.sqrt((1 - xz ** 2) * (1 - yz ** 2))


def spearman_interval(value, n):
    """Its 95% interval (Bonett and Wright 2000, Psychometrika 65); None where it has none."""
    if value is None or n < 4 or abs(value) > 1 - 1e-9:
        return None
    reach = 1.96 * math.sqrt((1 + value ** 2 / 2) / (n - 3))
    return [math.tanh(math.atanh(value) - reach), math.tanh(math.atanh(value) + reach)]


def show_analysis(rows):
    fit, general, related = analysis(rows)

    def text(triple, scale=1, digits=2):
        mean, std, interval = triple
        if std is None:
            return f'{mean * scale:.{digits}f}'
        low, high = (scale * v for v in interval)
        return f'{mean * scale:.{digits}f} ± {std * scale:.{digits}f} ' \
               f'[{low:.{digits}f}, {high:.{digits}f}]'

    def origin(line):
        return [str(line['searched_on'] or '-'), str(line['method']), str(line['arch_data'] or '-'),
                str(line['trained_on']), str(line['n'])]

    def correlation(line):
        value = '-' if line['spearman'] is None else f'{line["spearman"]:+.2f}'
        return value + (' [{:+.2f}, {:+.2f}]'.format(*line['interval']) if line['interval'] else '')

    head = ['architecture from', 'method', 'alphas on', 'trained on', 'n']
    print('Expressivity: the fit to what it was given')
    columns([[*head, 'loss', 'accuracy %', 'area under the training curve %'],
             *[[*origin(line), text(line['fit_loss'], 1, 3), text(line['fit_accuracy'], 100),
                text(line['train_area'], 100)] for line in fit]])
    if general:
        print('\nGeneralisation: test images of real data')
        columns([[*head, 'test error %', 'train - test, points'],
                 *[[*origin(line), text(line['test_error']), text(line['gap'])]
                   for line in general]])
    if related:
        print('\nRank correlation with the test error, over architectures')
        columns([['measure', 'trained on', 'test error on', 'n', 'correlation', 'given params'], *[
            [line['measure'], line['fit_on'] or '-', line['tested_on'], str(line['n']),
             correlation(line), '-' if line['given_params'] is None
             else f'{line["given_params"]:+.2f}'] for line in related]])


# ---------------------------------------------------------------------------------------------
# Plots, as SVG

HUES = ['#2b6cb0', '#c05621', '#2f855a', '#97266d', '#b7791f', '#2c7a7b', '#553c9a', '#718096',
        '#1a202c', '#e53e3e', '#68a510']


def chart(panels, names):
    """SVG text: panels below one another, (title, x label, [(name, marks, points)]).

    marks: 'line' or 'dots'; points: [(x, y)]. names: of the colours, in their order.
    """
    colour = {name: HUES[k % len(HUES)] for k, name in enumerate(names)}
    height = 300 * len(panels) + 22 * len(names) + 20
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-size="12" '
             'font-family="Helvetica, Arial, sans-serif" fill="#1a202c">',
             f'<rect width="720" height="{height}" fill="white"/>']
    for k, (title, below, series) in enumerate(panels):
        points = [p for _, _, values in series for p in values]
        (left, right), (low, high) = (span(axis) for axis in zip(*points)) if points \
            else ((0, 1), (0, 1))

        def place(x, y, top=300 * k + 34, left=left, right=right, low=low, high=high):
            return (64 + 630 * (x - left) / (right - left),
                    top + 220 - 220 * (y - low) / (high - low))

        middle = 'text-anchor="middle"'
        parts.append(f'<text x="64" y="{300 * k + 22}" font-weight="bold">{escape(title)}</text>'
                     f'<text x="379" y="{300 * k + 288}" {middle}>{escape(below)}</text>')
        for value in ticks(low, high):
            x, y = place(left, value)
            parts.append(f'<path d="M{x:.1f} {y:.1f} H694" stroke="#e2e8f0"/><text x="58" '
                         f'y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        for value in ticks(left, right):
            x, y = place(value, low)
            parts.append(f'<text x="{x:.1f}" y="{y + 17:.1f}" {middle}>{value:g}</text>')
        for name, marks, values in series:
            spots = [place(*p) for p in values]
            if marks == 'line':
                path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in spots)
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour[name]}" '
                             'stroke-width="1.5" stroke-opacity="0.8"/>')
            else:
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour[name]}" '
                          'fill-opacity="0.7"/>' for x, y in spots]
    for k, name in enumerate(names):
        y = 300 * len(panels) + 22 * k + 16
        parts.append(f'<rect x="64" y="{y - 10}" width="12" height="12" fill="{colour[name]}"/>'
                     f'<text x="84" y="{y}">{escape(name)}</text>')
    return '\n'.join(parts + ['</svg>\n'])


def span(values):
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low, high):
    """About five round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def plot_searches(rows):
    """SVG of entropy, skips and, where it is known, true accuracy by epoch, a line for each run."""
    names, panels = {}, {'entropy of the alphas, nats': 'entropy', 'skips': 'skips',
                         'true CIFAR-10 test accuracy, %': 'truth_for_analysis_only'}
    series = {title: [] for title in panels}
    for row in rows:
        name = ' '.join([row['method'], *(['on', Path(row['searched_on']).name]
                                           if row['searched_on'] else []),
                         *([f'(alphas: {row["arch_data"]})'] if row['arch_data'] not in (
                             'valid', None) else [])])
        names[name] = None
        for title, key in panels.items():
            points = []
            for line in row['log']:
                values = [v for k, v in line.items() if k.startswith(key) and v is not None]
                if values:
                    values = [v['cifar10'] if isinstance(v, dict) else v for v in values]
                    points.append((line['epoch'], sum(values) / len(values)))
            series[title].append((name, 'line', points))
    drawn = [(title, 'epoch', lines) for title, lines in series.items()
             if any(points for *_, points in lines)]
    if not drawn:
        raise UserError('--plot: nothing to draw: these searches had no alphas')
    return chart(drawn, list(names))


def plot_fit(related):
    """SVG of the test error against each fit, a dot for each architecture.

    The area under the training curve tells apart what ends at 100%.
    """
    panels, names = [], {}
    for line in related:
        if line['measure'] == 'train_area':
            series = {}
            for origin, (area, error) in zip(line['origins'], line['points']):
                series.setdefault(f'architecture from {origin}', []).append((100 * area, error))
            names.update(dict.fromkeys(series))
            panels.append((f'test error on {line["tested_on"]}, %',
                           f'area under the training curve on {line["fit_on"]}, %',
                           [(name, 'dots', points) for name, points in series.items()]))
    if not panels:
        raise UserError('--plot: nothing to draw: it takes three architectures with a test error')
    return chart(panels, list(names))


# ---------------------------------------------------------------------------------------------
# The study: does architecture search need real data?

MAIN_METHODS = ('darts', 'pcdarts', 'gdas', 'betadarts')
STUDY = ['command', 'commit', 'arm', 'method', 'arch_data', 'seed', 'genotype', *ACCURACIES,
         'percentile', 'skips', 'nones', 'entropy', 'signal', 'steps', 'seconds', 'alphas']
NUMBERS = *ACCURACIES, 'percentile', 'skips', 'nones', 'seconds'
REAL_ARM, NO_DATA, MARGIN, DRAWS = 'cifar10', 'no data', 10.0, 10000
CONTROLS = NO_DATA, 'no steps', 'random cell'
# In the order of tables, and of the figure's colours.
ARMS = [REAL_ARM, 'random_labels', 'generated', 'noise', 'random_labels 0.5', *(
    f'{arm}, alphas on train' for arm in (REAL_ARM, 'random_labels', 'noise')), *CONTROLS]


def arm_of(settings):
    """The arm of the study that a search belongs to."""
    name = settings['data']
    if settings['method'] == 'random':
        return 'random cell'
    if settings['max_steps'] == 0:
        return 'no steps'
    if settings['arch_data'] == 'none':
        return NO_DATA
    if name == 'random_labels' and settings['label_noise'] < 1:
        name += f' {settings["label_noise"]:g}'
    if name == 'generated' and (settings['generator'], settings['difficulty']) != (
            'fractal', 'medium'):
        name += f' {settings["generator"]} {settings["difficulty"]}'
    return f'{name}, alphas on train' if settings['arch_data'] == 'train' else name


def add_to_study(path, runs):
    """Append the searches of NAS-Bench-201 that have ended, and are not in the CSV yet, to it."""
    with locked(Path(path).with_name(f'.{Path(path).name}.lock')):
        rows = read_study(path) if Path(path).exists() else []
        known, new, waiting = {row['command'] for row in rows}, [], []
        for run in runs:
            about = read_json(Path(run) / 'args.json', 'settings')
            if about['settings'].get('space') != 'nb201':
                raise UserError(f'{run} is no search of --space nb201: leave it out')
            if not (Path(run) / 'genotype.json').exists():
                waiting.append(run)
            elif about['command'] not in known:
                known.add(about['command'])
                new.append(study_row(about, report(run)))
        refuse_unlike(path, rows + new)
        text = io.StringIO()
        writer = csv.DictWriter(text, STUDY, lineterminator='\n')
        if not rows:
            writer.writeheader()
        writer.writerows(new)
        before = Path(path).read_text().rstrip('\n') + '\n' if rows else ''
        if new:
            write_file(path, before + text.getvalue())
    print(f'{len(new)} searches added to the {len(rows)} in {path}'
          + f'; not finished: {", ".join(waiting)}' * bool(waiting))


def study_row(about, row):
    """A row of the CSV; alphas to 9 digits, which is what float32 has."""
    last, settings = (row['log'] or [{}])[-1], about['settings']
    alphas = [f'{a:.9g}' for edge in last.get('alphas', {}).get('cell', []) for a in edge]
    return {**{key: row[key] for key in STUDY if key in row}, 'command': about['command'],
            'commit': about.get('git_commit'), 'arm': arm_of(settings),
            'method': method_of({**settings, 'max_steps': None}),
            **{name: None if last.get(f'{name}_cell') is None
               else float(f'{last[f"{name}_cell"]:.4g}') for name in ('entropy', 'signal')},
            'alphas': ' '.join(alphas), 'seconds': round(row['seconds'], 1),
            'steps': sum(line.get('steps', 0) for line in row['log'])}


def read_study(path):
    """Rows of the CSV as reports of searches, by method, arm and seed."""
    try:
        with open(path, newline='') as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames
        if names != STUDY or not rows:
            raise ValueError('its columns are not ours, or it has no rows')
        for row in rows:
            from_string(row['genotype'])
            row['seed'] = int(row['seed'])
            for key in NUMBERS:
                row[key] = float(row[key])
            alphas = np.array(row['alphas'].split(), float)
            if alphas.size not in (0, 30) or None in row or None in row.values() or not (
                    0 <= row['percentile'] <= 100
                    and math.isfinite(sum(alphas) + sum(row[key] for key in NUMBERS))):
                raise ValueError(f'seed {row["seed"]} of {row["method"]} on {row["arm"]}')
            row.update(space='nb201', searched_on=row['arm'],
                       collapsed=row['skips'] + row['nones'] >= 4,
                       log=[{'alphas': {'cell': alphas.reshape(6, 5)}}] if alphas.size else [])
        refuse_unlike(path, rows)
    except FileNotFoundError:
        raise UserError(f'{path} is missing: make it with --add') from None
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f'{path}: no study of ours ({error}): take it from a copy') from None
    return sorted(rows, key=lambda row: (
        row['method'] == 'random', [*MAIN_METHODS, row['method']].index(row['method']),
        row['method'], [*ARMS, row['arm']].index(row['arm']), row['arm'], row['seed']))


def refuse_unlike(path, rows):
    """UserError where rows of one method and arm share a seed, or were run with other settings."""
    for (method, arm), members in groups(rows, 'method', 'arm').items():
        seeds = [int(row['seed']) for row in members]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            raise UserError(f'{path}: rows of {method}, {arm}, seed {twice}: seeds must differ: '
                            'leave out all but one')
        first, *others = (given(row['command']) for row in members)
        for other in others:
            for flag, _ in sorted(first.items() ^ other.items()):
                raise UserError(f'{path}: rows of {method}, {arm} differ in {flag}: leave those '
                                'of other settings out')


def given(command):
    """{flag: value} of a stored command, without those that may differ within an arm."""
    flags, flag = {}, None
    for word in shlex.split(command)[2:]:
        if word.startswith('--'):
            flag, _, word = word.partition('=')
        flags[flag] = word
    return {flag: word for flag, word in flags.items()
            if flag[2:] not in FREE | {'seed', 'data_seed'}}


def student(t, df):
    """P(T <= t) of Student's distribution, by integrating its density."""
    x = np.linspace(0, min(abs(t), 1000.0), 20001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    y = scale * (1 + x ** 2 / df) ** (-(df + 1) / 2)
    half = float((y[1:] + y[:-1]).sum() / 2 * (x[1] - x[0]))
    return 0.5 + half if t >= 0 else 0.5 - half


def student_quantile(p, df):
    """The t, between -1000 and 1000, with P(T <= t) = p."""
    low, high = -1000.0, 1000.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, df) < p else (low, middle)
    return low


def welch(*samples):
    """(standard error of the sum or difference of the samples' means, degrees of freedom).

    The degrees are Welch's; (0, infinity) where each sample is of one value, but for rounding.
    """
    values = [(np.var(v, ddof=1) / len(v), len(v)) for v in samples]
    variance = sum(v for v, _ in values)
    if variance < 1e-20:
        return 0.0, math.inf
    return math.sqrt(variance), variance ** 2 / sum(v ** 2 / (n - 1) for v, n in values)


def greater(a, b, by=0.0):
    """p of Welch's test that the mean of a is not more than that of b (a list or a number) + by."""
    difference = np.mean(a) - np.mean(b) - by
    error, df = welch(a) if isinstance(b, (int, float)) else welch(a, b)
    if not error:
        return 0.0 if difference > 1e-9 else 1.0
    return 1 - student(difference / error, df)


def bootstrap(*pairs):
    """95% interval of mean(a) - mean(b), resampling the seeds of both; of several, of its mean."""
    rng = np.random.Generator(np.random.Philox(0))
    means = [np.asarray(v)[rng.integers(0, len(v), (DRAWS, len(v)))].mean(1)
             for pair in pairs for v in pair]
    differences = sum(means[::2]) - sum(means[1::2])
    return np.percentile(differences / len(pairs), [2.5, 97.5]).tolist()


def holm(values):
    """Holm's p-values of a family of tests, in its order."""
    order, out, worst = sorted(range(len(values)), key=values.__getitem__), [0] * len(values), 0.0
    for k, place in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - k) * values[place]))
        out[place] = worst
    return out


def power(a, b, tests=1, difference=20.0):
    """(chance to find a difference of that size, chance to find equal arms equivalent), at 5%.

    Of Welch's two-sided and two one-sided tests, for deviations as in a, b, and at 5% / tests, the
    strictest that Holm's correction of so many can ask for. By Student's distribution shifted by
    the difference; simulated studies have up to .03 more. (Equivalent is rarer than that: both
    arms must beat the controls.)
    """
    level, (error, df) = 0.05 / tests, welch(a, b)
    if not error:
        return 1.0, 1.0
    t = student_quantile(1 - level / 2, df)
    return (student(difference / error - t, df) + student(-difference / error - t, df),
            max(0.0, 2 * student(MARGIN / error - student_quantile(1 - level, df), df) - 1))


def pinned(rows):
    """Whether nearly all seeds, 80%, ended in one cell, or most in a collapsed one."""
    cells = [row['genotype'] for row in rows]
    return max(map(cells.count, cells)) >= 0.8 * len(cells) \
        or sum(row['collapsed'] for row in rows) > len(rows) / 2


LEAST = 8           # seeds of an arm, of real data, of no data, for more than 'undecided'


def compare(rows):
    """A line for each method and arm: n, percentile, differences, and a verdict beside real data.

    An arm with alphas on train is compared with real data so searched, where there are such.
    equivalent: two one-sided tests within MARGIN points, Holm's p under .05. worse, better: not
    equivalent, Holm's p under .05 for a difference, and the higher arm beats a random cell (50,
    exactly) at 5%. Equivalent counts only where both arms beat a random cell and the same method
    without data at 5%; where not, or where an arm is pinned, it is uninformative. Else, and with
    fewer than LEAST seeds, undecided. Holm's families: the methods that have a verdict on an arm,
    those with fewer than LEAST seeds apart.
    """
    by, out = groups(rows, 'method', 'arm'), {}
    found = {key: [row['percentile'] for row in members] for key, members in by.items()}
    for (method, arm), members in by.items():
        like = REAL_ARM + ''.join(arm.partition(', alphas')[1:])
        against = like if (method, like) in by else REAL_ARM
        values, real, none = (found.get((method, name), []) for name in (arm, against, NO_DATA))
        line = out[method, arm] = {
            'arm': arm, 'method': method, 'against': against, 'n': len(values),
            'percentile': float(np.mean(values)), 'median': float(np.median(values)),
            'std': float(np.std(values, ddof=1)) if len(values) > 1 else None,
            **{name: [float(of([row[name] for row in members])) for of in (np.mean, np.median)]
               for name in ACCURACIES},
            'collapsed': float(np.mean([row['collapsed'] for row in members])),
            'over_largest': sum(value > truth(NB201_LARGEST)['percentile'] for value in values),
            'cells': len({row['genotype'] for row in members})}
        if len(values) > 1:
            line['interval_random'] = bootstrap((values, [50.0]))
            line['over_random'] = greater(values, 50.0)
            if len(none) > 1 and arm != NO_DATA:
                line['over_no_data'] = greater(values, none)
        if real and arm not in (against, *CONTROLS):
            line['verdict'] = 'undecided'
            if min(len(real), len(values)) > 1:
                line['difference'] = line['percentile'] - float(np.mean(real))
                line['interval'] = bootstrap((values, real))
                line['p'] = min(1.0, 2 * min(greater(values, real), greater(real, values)))
                line['p_equivalent'] = max(greater(values, real, -MARGIN),
                                           greater(real, values, -MARGIN))
                line['enough'] = min(map(len, (values, real, none))) >= LEAST
    for lines in groups([x for x in out.values() if x.get('enough')], 'arm').values():
        for key in ('p', 'p_equivalent'):
            for line, value in zip(lines, holm([line[key] for line in lines])):
                line[key] = value
        for line in lines:
            pair = [(line['method'], line[name]) for name in ('arm', 'against')]
            line['verdict'] = verdict(line, out[pair[1]], any(pinned(by[key]) for key in pair))
            line['power'] = power(*(found[key] for key in pair), len(lines))
    return list(out.values())


def beats_controls(line):
    """Whether an arm is better than a random cell and than no data, at 5%."""
    return all(line.get(key, 1.0) < 0.05 for key in ('over_random', 'over_no_data'))


def verdict(line, real, is_pinned):
    higher = real if line['difference'] < 0 else line
    if line['p'] < 0.05 <= line['p_equivalent'] and higher['over_random'] < 0.05:
        return 'worse' if line['difference'] < 0 else 'better'
    if is_pinned or not (beats_controls(line) and beats_controls(real)):
        return 'uninformative'
    return 'equivalent' if line['p_equivalent'] < 0.05 else 'undecided'


def answers(lines):
    """{unreal kind: what the verdicts of the main methods on it, alphas held out, come to}."""
    out = {}
    main = [line for line in lines if line['method'] in MAIN_METHODS and line['arm'] in USED
            and line.get('verdict')]
    for (arm,), members in groups(main, 'arm').items():
        found = {line['verdict'] for line in members}
        good, bad = bool(found & {'equivalent', 'better'}), 'worse' in found
        out[arm] = 'it depends on the method' if good and bad else \
            'no real data are needed' if good else 'real data are needed' if bad else \
            'uninformative' if found == {'uninformative'} else 'undecided'
    return out


def sound(lines, arm=REAL_ARM):
    """The main methods that beat a random cell and their own search without data on an arm."""
    return [line['method'] for line in lines
            if line['arm'] == arm and line['method'] in MAIN_METHODS and beats_controls(line)]


def pooled(rows, lines):
    """{arm: (methods, mean of their differences from real data, its 95% interval)}.

    Of the methods that are sound on the real data: one method finds little in 16 seeds, all
    together find more. Described beside the verdicts, which it does not enter.
    """
    by, out = groups(rows, 'method', 'arm'), {}
    known = [line for line in lines
             if 'difference' in line and line['method'] in sound(lines, line['against'])]
    for (arm,), members in groups(known, 'arm').items():
        pairs = [[[row['percentile'] for row in by[line['method'], line[name]]]
                  for name in ('arm', 'against')] for line in members]
        out[arm] = ([line['method'] for line in members],
                    float(np.mean([line['difference'] for line in members])), bootstrap(*pairs))
    return out


def held_out(rows):
    """Those of real data and the three unreal kinds, alphas held out: they differ in the data."""
    return [row for row in rows if row['arm'] in (REAL_ARM, *USED)]


def explained(rows):
    """{method: (share of the variance of the percentile between kinds of data, that by chance)}.

    Eta squared, of the arms of held_out(); a method with one seed an arm is left out.
    """
    out = {}
    for (method,), members in groups(held_out(rows), 'method').items():
        arms = [[row['percentile'] for row in part] for part in groups(members, 'arm').values()]
        values = np.concatenate(arms)
        total = ((values - values.mean()) ** 2).sum()
        if 1 < len(arms) < len(values) and total:
            between = sum(len(v) * (np.mean(v) - values.mean()) ** 2 for v in arms)
            out[method] = float(between / total), (len(arms) - 1) / (len(values) - 1)
    return out


def study(path, plot=None):
    """Print the tables of the study, its answer and what explains it; draw its figure."""
    rows = read_study(path)
    lines = compare(rows)
    print(f'Percentile of the found cell among the {len(nas_bench_201()[0]):,} of NAS-Bench-201 by '
          'CIFAR-10 test accuracy')
    columns(main_table(lines), bars=True)
    print("\nTrue test accuracies, mean (median); p-values, those of difference and equivalence "
          "Holm's where power is given")
    columns(second_table(lines), bars=True)

    def seconds(*arms):
        return [row['seconds'] for row in rows if row['arm'] in arms]
    data = {row['arm'] for row in rows} - set(CONTROLS)
    parts = (('with data', seconds(*data)), ('without', seconds(NO_DATA)),
             ('of no steps', seconds(*CONTROLS[1:])))
    print('\nCollapsed: 4 or more of 6 edges skip or none (17.9% of all cells). Over largest: '
          'seeds\nwhose cell is better than the largest network, which is at '
          f'{truth(NB201_LARGEST)["percentile"]:.1f}.\n{len(rows)} searches, '
          f'{sum(row["seconds"] for row in rows) / 3600:.1f} hours of them: '
          + ', '.join(f'{len(s)} {what} of {np.mean(s):.0f} s' for what, s in parts if s))
    for arm, answer in answers(lines).items():
        print(f'{arm}: {answer}')
    for arm, (methods, difference, interval) in pooled(rows, lines).items():
        print(f'{arm}: mean difference from real data over {", ".join(methods)} '
              + '{:+.1f} [{:+.1f}, {:+.1f}]'.format(difference, *interval))
    for method, (share, chance) in explained(rows).items():
        print(f'{method}: {100 * share:.0f}% of the variance of the percentile lies between kinds '
              f'of data, alphas held out (by chance {100 * chance:.0f}%)')
    for methods in dict.fromkeys([tuple(MAIN_METHODS), tuple(sound(lines))]):
        for line in agreements([row for row in held_out(rows) if row['method'] in methods]):
            print(f'{", ".join(methods)}, {line["pairs"]}: {line["n"]} pairs, genotypes agree in '
                  f'{line["genotypes"]:.2f} of the edges, probabilities correlate by '
                  f'{filled("{:+.2f}", line["alphas"])}')
    if plot:
        write_file(plot, study_figure(rows))


def filled(form, *values):
    """form with its values, or a dash where one is missing."""
    return '-' if None in values else form.format(*values)


def main_table(lines):
    """Lists of texts: what README.md shows of the lines of compare()."""
    out = [['method', 'arm', 'n', 'percentile', 'from real [95%]', 'from random [95%]', 'verdict',
            'collapsed', 'over largest', 'cells']]
    for line in lines:
        none = (None, None)
        out.append([
            line['method'], line['arm'], str(line['n']), f'{line["percentile"]:.1f} ± '
            + filled('{:.1f}', line['std']),
            filled('{:+.1f} [{:+.1f}, {:+.1f}]', line.get('difference'),
                   *line.get('interval', none)),
            filled('{:+.1f} [{:+.1f}, {:+.1f}]', line['percentile'] - 50,
                   *line.get('interval_random', none)),
            line.get('verdict', '-'), f'{100 * line["collapsed"]:.0f}%',
            str(line['over_largest']), str(line['cells'])])
    return out


def second_table(lines):
    """Lists of texts: accuracies, medians, and the tests behind the verdicts."""
    out = [['method', 'arm', 'n', 'median percentile', 'CIFAR-10 %', 'CIFAR-100 %', 'ImageNet16 %',
            'p over random', 'p over no data', 'p different', 'p equivalent', 'power: 20 points',
            'equality']]
    for line in lines:
        tests = [line.get(name) for name in ('over_random', 'over_no_data', 'p', 'p_equivalent')]
        out.append([line['method'], line['arm'], str(line['n']), f'{line["median"]:.1f}',
                    *(f'{line[name][0]:.2f} ({line[name][1]:.2f})' for name in ACCURACIES),
                    *('<.001' if p is not None and p < 0.001 else filled('{:.3f}', p)
                      for p in tests),
                    *(filled('{:.2f}', chance) for chance in line.get('power', (None, None)))])
    return out


def study_figure(rows):
    """SVG: a panel a method, two beside one another, a dot for each seed of an arm."""
    _, ordered = nas_bench_201()
    largest = truth(NB201_LARGEST)['percentile']
    parts, top, below, arms = [], 64, 64, ARMS + [row['arm'] for row in rows]
    for panel, ((method,), members) in enumerate(groups(rows, 'method').items()):
        left, top = 240 + 570 * (panel % 2), top if panel % 2 else below
        parts.append(f'<text x="{left}" y="{top}" font-weight="bold">{escape(method)}</text>')
        by_arm = groups(members, 'arm')
        bottom = top + 24 * len(by_arm) + 8
        for k, ((arm,), part) in enumerate(by_arm.items()):
            parts += figure_row(arm, [row['percentile'] for row in part], left, top + 22 + 24 * k,
                                HUES[arms.index(arm) % len(HUES)])
        below = max(below, bottom + 42)
        for value, dash in ((50, '4 3'), (largest, '1 3'), (100, '')):
            parts.append(f'<path d="M{left + 3.2 * value:.1f} {top + 8} V{bottom}" '
                         f'stroke="#718096" stroke-dasharray="{dash}"/>')
        parts += [f'<text x="{left + 3.2 * v}" y="{bottom + 12}" text-anchor="middle" '
                  f'fill="#718096">{v}</text>' for v in range(0, 101, 25)]
    height = below + 14
    note = [f'Cells found by searches on real and unreal data: percentile among all '
            f'{len(ordered["cifar10"]):,} cells of NAS-Bench-201 by true CIFAR-10 test accuracy.',
            'A dot a seed (n); bar and line: mean and its 95% bootstrap interval. Vertical: '
            f'the median cell (50, {ordered["cifar10"][7812]:.2f}%), the largest network '
            f'({largest:.1f}, {truth(NB201_LARGEST)["cifar10"]:.2f}%), the best cell (100, '
            f'{ordered["cifar10"][-1]:.2f}%).']
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1150 {height}" font-size="12" '
        'font-family="Helvetica, Arial, sans-serif" fill="#1a202c">',
        f'<rect width="1150" height="{height}" fill="white"/>',
        f'<text x="16" y="24" font-size="15">{note[0]}</text>', *parts,
        f'<text x="16" y="{height - 18}">{note[1]}</text>', '</svg>\n'])


def figure_row(arm, values, left, y, hue):
    """SVG of an arm: its name and n, a dot for each value, mean and interval."""
    parts = [f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(arm)} ({len(values)})'
             '</text>']
    parts += [f'<circle cx="{left + 3.2 * v:.1f}" cy="{y - 3 + 6 * (n % 2)}" r="3" fill="{hue}" '
              'fill-opacity="0.55"/>' for n, v in enumerate(values)]
    if len(values) > 1:
        low, high = (left + 3.2 * (50 + bound) for bound in bootstrap((values, [50.0])))
        parts.append(f'<path d="M{low:.1f} {y} H{high:.1f}" stroke="#1a202c" stroke-width="2"/>')
    mean = left + 3.2 * float(np.mean(values))
    parts.append(f'<path d="M{mean:.1f} {y - 9} V{y + 9}" stroke="#1a202c" '
                 'stroke-width="3"/>')
    return parts


@one_line_errors
def main(argv=None):
    parser = Parser(prog='evaluate.py', description=__doc__.split('\n')[0])
    parser.add_argument('runs', nargs='*', metavar='RUN', help='run folders; with --analysis also '
                        'files of what --json printed of them')
    parser.add_argument('--json', action='store_true', help='one JSON line for each run')
    parser.add_argument('--csv', metavar='FILE', help='write the table of the groups')
    parser.add_argument('--plot', metavar='FILE', help='write an SVG: what searches did by epoch, '
                        'or with --analysis the fit against the test error')
    parser.add_argument('--analysis', action='store_true',
                        help='expressivity and generalisation of retrained networks')
    parser.add_argument('--study', metavar='CSV', help='the table of a study, and with --plot its '
                        'figure, from its CSV alone')
    parser.add_argument('--add', metavar='CSV', help='append finished searches to it')
    parser.add_argument('--data_dir', help='where the real data are now')
    parser.add_argument('--gpu', type=number(int, -1), default=0, help='CUDA device, -1: CPU')
    parser.add_argument('--batch_size', type=number(int, 1), default=50,
                        help='of the test; changes no result')
    parser.add_argument('--test_labels', metavar='FILE', help="CSV of CheXpert's test set")
    parser.add_argument('--view_pooling', choices=['max', 'mean'], default='max',
                        help="of the scores of a study's views")
    group = parser.add_argument_group('cost without training')
    group.add_argument('--cost', action='store_true', help='count the network of --arch')
    group.add_argument('--arch', help='a published name, a genotype.json or a search run')
    group.add_argument('--init_channels', type=number(int, 1, 4096), help='36; in nb201 16')
    group.add_argument('--layers', type=number(int, 1, 200), help='20; in nb201 17')
    group.add_argument('--num_classes', type=number(int, 1), default=10)
    group.add_argument('--image_size', type=number(int, 8, 4096), default=32)
    group.add_argument('--stem', choices=['auto', 'cifar', 'imagenet'], default='auto')
    args = parser.parse_args(argv)

    for flag, file in (('--csv', args.csv), ('--plot', args.plot), ('--add', args.add)):
        if file and not Path(file).resolve().parent.is_dir():
            raise UserError(f'{flag} {file}: no such folder: make it first')
        if file and Path(file).is_dir():
            raise UserError(f'{flag} {file} is a folder: give a file')
    with_cost = 'arch', 'init_channels', 'layers', 'num_classes', 'image_size', 'stem'
    without = 'csv', 'plot', 'analysis', 'add', 'study', 'test_labels'
    for name in without if args.cost else with_cost:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f'--{name} does nothing ' + (
                'with --cost: leave one out' if args.cost else
                'without --cost: add that, or leave it out'))
    if args.cost:
        if args.runs:
            raise UserError(f'--cost counts --arch alone: leave out {args.runs[0]}')
        if not args.arch:
            raise UserError('--cost needs --arch: a published name, a genotype.json or a run')
        genotype, _ = find_genotype(args.arch)
        channels, layers = (16, 17) if isinstance(genotype, str) else (36, 20)
        check_layers(genotype, args.layers or layers)
        counts = cost(genotype, args.init_channels or channels, args.layers or layers,
                      args.num_classes, args.image_size, stem_of(args, args.image_size))
        print(json.dumps(counts) if args.json else '\n'.join(
            f'{name:<18} {count:>15,}' for name, count in counts.items()))
        return
    if args.add or args.study:
        if args.runs and not args.add:
            raise UserError(f'--study takes its CSV alone: leave out {args.runs[0]}, or --add it')
        unused = [f'--{name}' for name in ('json', 'csv', 'analysis') if getattr(args, name)]
        unused += ['--plot'] if args.plot and not args.study else []
        if unused:
            raise UserError(f'{unused[0]} does nothing with --study and --add: leave it out')
        if args.add:
            add_to_study(args.add, args.runs)
        if args.study:
            study(args.study, args.plot)
        return
    if not args.runs:
        raise UserError('nothing to evaluate: give run folders, or --arch NAME --cost')
    computes = any((Path(run) / 'weights.pt').exists() for run in args.runs)
    device = choose_device(args.gpu if computes else -1)
    runs = {Path(run).resolve(): run for run in args.runs}
    rows = []
    for run in runs.values():
        rows += read_reports(run) if args.analysis and Path(run).is_file() else [report(
            run, args.data_dir, device, args.batch_size, args.test_labels, args.view_pooling)]
    wanted = 'retrain' if args.analysis else 'search'
    if args.analysis or args.plot:
        other = next((row['run'] for row in rows if row['type'] != wanted), None)
        if other:
            raise UserError(f'--{"analysis" if args.analysis else "plot"}: {other} is not a run of '
                            f'{wanted}.py: leave it out')
        other = next((row['run'] for row in rows if args.analysis and row['fit_accuracy'] is None),
                     None)
        if other:
            raise UserError(f'--analysis: {other} has no accuracy (several labels, or no log): '
                            'leave it out')
    twice = next((members for members in groups(rows, 'run').values() if len(members) > 1), None)
    if twice:
        raise UserError(f'{twice[0]["run"]} is given twice: leave one out')
    lines = table(rows)
    for line in mixtures(rows):
        print(line, file=sys.stderr)
    for row in rows:
        if args.json:
            print(json.dumps({key: value for key, value in row.items()
                              if key not in ('log', 'settings')}))
        elif len(rows) == 1 and not args.analysis:
            show(row)
    if not args.json and not args.analysis:
        if len(rows) > 1:
            show_table(lines)
        searches = [row for row in rows if row['type'] == 'search']
        known, pairs = true_by_epoch(searches), agreements(searches)
        if known:
            print('\nTrue CIFAR-10 accuracy, %, of the genotype after an epoch, for analysis only')
            columns(known)
        if pairs:
            print('\nAgreement of pairs of runs')
            columns([['space', 'pairs', 'n', 'genotypes', 'alphas'], *[
                [line['space'], line['pairs'], str(line['n']), f'{line["genotypes"]:.2f}',
                 '-' if line['alphas'] is None else f'{line["alphas"]:+.2f}'] for line in pairs]])
    if args.analysis and not args.json:
        show_analysis(rows)
    if args.plot:
        write_file(args.plot, plot_fit(correlations(rows)) if args.analysis
                   else plot_searches(rows))
    if args.csv:
        text = io.StringIO()
        names = dict.fromkeys(name for line in lines for name in line)
        writer = csv.DictWriter(text, names, lineterminator='\n')
        writer.writeheader()
        writer.writerows(lines)
        write_file(args.csv, text.getvalue())


if __name__ == '__main__':
    sys.exit(main())
