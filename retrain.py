"""Train the network of a genotype from scratch: on CIFAR, ImageNet, CheXpert, or unreal data.

    python retrain.py --arch runs/NAME --data cifar10 --auxiliary --cutout --gpu 0  # 600 epochs
    python retrain.py --arch runs/NAME --data noise --gpu 0          # how well can it fit noise?
    python retrain.py --arch runs/NAME --data noise --preset laptop  # of nb201, on a CPU
    python retrain.py --arch runs/NAME --data cifar10 --quick        # a minute on a CPU
    torchrun --nproc_per_node 8 retrain.py --arch DARTS_V2 --data imagenet --data_dir DIR --resume
    python retrain.py --arch runs/NAME --data chexpert --data_dir DIR --gpu 0

The last epoch's test error is the result; on CheXpert the epoch is chosen on held-out patients.
search.py takes its settings, runs, schedule and CUDA graph from here, and adds the alphas.
Recipe: DARTS (arXiv 1806.09055), with cutout (arXiv 1708.04552), an auxiliary head (arXiv
1409.4842) and drop-path (arXiv 1605.07648); on ImageNet that of PC-DARTS (arXiv 1907.05737).
"""
import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

# Before torch: generate_data sets how OpenMP's threads wait.
from generate_data import (AUGMENTATIONS, DATA, KINDS, REAL, Batches, Progress, Setting, UserError,
                           choose_device, evenly, find_or_make, is_first, leave, load_file,
                           name_or_path, num_processes, number, one_line_errors, parse_flags, read,
                           readable, refuse_idle, settings_of, world, write_file)
from evaluate import MAY_DIFFER, correct, gather, loss_of, metric_columns, read_json, read_log, test

import numpy as np
import torch

from genotypes import find_genotype, plain, short_name, to_json
from model_search import Network

# ---- Settings: those that a search shares, then those of this script. Defaults are DARTS's. -

INPUT = {
    'data': Setting('cifar10', f'{", ".join([*KINDS, *REAL])}, or a folder', name_or_path),
    **DATA,
    'augment': Setting('auto', 'auto: by the images, none for noise', ['auto', *AUGMENTATIONS]),
    'workers': Setting(2, 'processes that read large data sets', number(int, 0, 1024)),
}
SCHEDULE = {
    'epochs': Setting(600, 'passes over the data', number(int, 1)),
    'steps_per_epoch': Setting(None, 'else as many as the data give', number(int, 1)),
    'batch_size': Setting(96, 'of all processes together', number(int, 2)),
    'grad_accum': Setting(1, 'parts in which a batch is computed, to save memory', number(int, 1)),
    'learning_rate': Setting(0.025, 'of the weights', number(float, 0)),
    'learning_rate_min': Setting(0.0, 'at the end', number(float, 0)),
    'warmup_epochs': Setting(0, 'in which the learning rate rises linearly', number(int, 0)),
    'momentum': Setting(0.9, 'of SGD', number(float, 0, 1)),
    'weight_decay': Setting(3e-4, 'of the weights', number(float, 0)),
    'grad_clip': Setting(5.0, "largest norm of the gradient; 0: no limit", number(float, 0)),
}
# --help shows these first.
FIRST = ('data', 'method', 'arch', 'space', 'epochs', 'preset', 'quick', 'gpu', 'seed', 'save',
         'resume')
RUN = {
    'gpu': Setting(0, 'CUDA device, -1: the CPU', number(int, -1)),
    'seed': Setting(0, 'of everything that is drawn', number(int, 0)),
    'save': Setting(None, 'run folder; by default runs/ and a name by what was typed'),
    'resume': Setting(False, 'go on from the last checkpoint, or start if there is none'),
    'checkpoint_minutes': Setting(10.0, 'between checkpoints within an epoch', number(float, 0)),
    'amp': Setting(False, 'bf16 autocast'),
    'tf32': Setting(False, 'TF32 products on CUDA'),
    'graph': Setting('auto', 'auto: a CUDA graph replays the step', ['auto', 'off']),
    'quick': Setting(False, 'a few steps of a small network, a minute; means nothing'),
}
NETWORK = {
    'arch': Setting(None, "a name, a search, or a file with a genotype", name_or_path),
    'init_channels': Setting(36, 'channels of the first cell', number(int, 2, 4096)),
    'layers': Setting(20, 'cells', number(int, 1, 200)),
    'stem': Setting('auto', 'one convolution, or three of stride 2; auto: these above 64 px',
                    ['auto', 'cifar', 'imagenet']),
    'auxiliary': Setting(False, 'a second head while training'),
    'drop_path_prob': Setting(0.2, 'at the end, reached linearly', number(float, 0, 1)),
    'cutout': Setting(0, 'side of a blanked square, pixels; alone: 16; 0: no', number(int, 0), 16),
}
RECIPE = {
    'label_smoothing': Setting(0.0, 'share spread over all classes', number(float, 0, 1)),
    'holdout_patients': Setting(0.0, 'share that chooses the epoch', number(float, 0, 1)),
    'train_portion': Setting(1.0, 'share of the images; above 1: number', number(float, 0)),
}
# Set by a preset only, without flags: the optimizer, sgd or adam, and the schedule, cosine or
# linear; least_batches: batches of few images are smaller, so that an epoch has so many
FIXED = dict(optimizer='sgd', nesterov=False, schedule='cosine', least_batches=0)
# nb201: the benchmark's recipe, by default for its cells. ImageNet: that of PC-DARTS and P-DARTS,
# with the learning rate for 1,024 images. CheXpert and laptop: our own choice.
PRESETS = {
    'cifar': {},
    'nb201': dict(epochs=200, batch_size=256, learning_rate=0.1, nesterov=True, weight_decay=5e-4,
                  grad_clip=0.0, drop_path_prob=0.0, init_channels=16, layers=17),
    'laptop': dict(epochs=20, batch_size=64, learning_rate=0.1, nesterov=True, weight_decay=5e-4,
                   drop_path_prob=0.0, init_channels=16, layers=5, image_size=16,
                   train_portion=2000, augment='none', least_batches=20),
    'imagenet': dict(epochs=250, batch_size=1024, rate_for=1024, learning_rate=0.5,
                     schedule='linear', warmup_epochs=5, weight_decay=3e-5, label_smoothing=0.1,
                     drop_path_prob=0.0, init_channels=48, layers=14, image_size=224,
                     num_images=128000, num_classes=1000, source='imagenet'),
    'chexpert': dict(epochs=5, batch_size=32, optimizer='adam', learning_rate=1e-4,
                     weight_decay=0.0, drop_path_prob=0.0, init_channels=48, layers=14,
                     image_size=320, holdout_patients=0.02, num_images=20000, num_classes=14,
                     multilabel=True, source='chexpert')}
QUICK = dict(num_images=1000, epochs=2, steps_per_epoch=40, batch_size=32, init_channels=8,
             layers=5, warmup_epochs=0)
FIT_IMAGES = 10000          # training images on which the fit is measured at the end
# How the line of an epoch that a run prints shows entries of its log, in addition to the METRICS
SAID = {'train_loss': 'training loss {:.3f}', 'train_accuracy': 'accuracy {:.1%}',
        'valid_loss': "loss on the alphas' images {:.3f}", 'valid_accuracy': 'accuracy {:.1%}',
        'skips_normal': 'skips in the normal cell: {}', 'skips_reduce': 'in the reduction cell: {}',
        'skips_cell': 'skips: {}',
        'truth_for_analysis_only': 'true CIFAR-10 accuracy of this cell {[cifar10]:.2f}%',
        'kept_after_epochs': 'kept: the network after epoch {}'}


def settle(doc, tables, argv, presets, defaults_for):
    """(settings as a namespace, what was typed); UserError if settings clash.

    defaults_for(typed, chosen, preset): the defaults of a command line, as in parse_flags.
    """
    def merged(typed, chosen):
        preset = chosen['preset']
        if preset == 'auto':
            real = chosen['source'] if chosen['data'] == 'random_labels' else chosen['data']
            preset = real if real in presets else 'cifar'
        # A preset sets only those settings of data that these data use. A written set has its size.
        out, known = defaults_for(typed, chosen, preset), settings_of(chosen['data'], chosen)
        if chosen['data'] not in KINDS and Path(chosen['data'], 'meta.json').exists():
            known.discard('image_size')
        return {name: out[name] for name in out if name not in DATA or name in known}

    preset = Setting('auto', 'defaults; auto: by the data (and the cell)', ['auto', *presets])
    tables, most_used = copy.deepcopy({**tables, 'run': {'preset': preset, **RUN}}), {}
    for table in tables.values():
        most_used.update({name: table.pop(name) for name in FIRST if name in table})
    s, typed, defaults = parse_flags(doc, {'most used': most_used, **tables}, argv, merged)
    refuse_idle(typed, DATA.keys() - settings_of(s['data'], s), f'for --data {s["data"]}')
    if s['data_seed'] is None:
        s['data_seed'] = s['seed']
    for name in {'warmup_epochs', 'frozen_epochs'} & (s.keys() - typed.keys()):
        # A run of another length has the same share of such epochs, and at least one other.
        share = defaults[name] / defaults['epochs']
        s[name] = min(round(share * s['epochs']), max(0, s['epochs'] - 1))
    rate_for = s.pop('rate_for', None)
    if rate_for and 'learning_rate' not in typed:
        s['learning_rate'] *= s['batch_size'] / rate_for
    if 'learning_rate_min' not in typed:
        s['learning_rate_min'] = min(s['learning_rate_min'], s['learning_rate'])
    args = SimpleNamespace(**s, typed=sorted(typed))        # for the table of evaluate.py
    parts = args.grad_accum * int(os.environ.get('WORLD_SIZE', 1))
    if args.batch_size % parts or args.batch_size // parts < 2:
        raise UserError(f'--batch_size {args.batch_size} makes no {parts} parts of two images or '
                        'more, for --grad_accum and processes: take a multiple')
    if args.warmup_epochs >= max(1, args.epochs):
        raise UserError(f'--warmup_epochs must be below --epochs {args.epochs}')
    return args, typed


def stem_for(stem, image_size, auxiliary=False):
    """'cifar' or 'imagenet' for --stem; UserError if it leaves too few pixels."""
    if stem == 'auto':
        stem = 'imagenet' if image_size > 64 else 'cifar'
    least = {'cifar': (8, 29), 'imagenet': (32, 193)}[stem]
    if image_size < least[auxiliary]:
        raise UserError(f'{image_size} px are too few: --stem {stem} needs {least[0]}, with '
                        f'--auxiliary {least[1]}')
    return stem


def batch_of(args, images):
    """--batch_size; or less, if the images are few and there must be some batches of them."""
    if 'batch_size' in args.typed or not args.least_batches:
        return args.batch_size
    parts = args.grad_accum * num_processes()
    size = min(args.batch_size, max(8, images // args.least_batches))
    return max(2 * parts, size - size % parts)


def run_name(script, first, args, typed):
    """runs/SCRIPT-first words-seed, and what else was typed."""
    def word(value):
        if isinstance(value, float):
            return f'{value:g}'
        if str(value).startswith('|'):
            return short_name(value)
        return Path(str(value).removesuffix('genotype.json')).name.replace(' ', '_')

    words = [script, *map(word, first), f'seed{args.seed}']
    for name in sorted(typed.keys() - MAY_DIFFER - {'data', 'method', 'arch', 'seed'}):
        words.append(name if typed[name] is True else f'{name}={word(typed[name])}')
    return 'runs/' + '-'.join(words)


def learning_rate_at(args, epoch, epochs):
    """Learning rate of an epoch: a fall to learning_rate_min, scaled by the warm-up at the start.

    epochs: of the run, or of a stage, which has its own fall and warm-up. linear is as PC-DARTS on
    ImageNet: for E = 250 lr (E-5-e) / (E-5), and in the last five epochs lr (E-e) / (5 (E-5)).
    """
    tail = round(epochs / 50)
    if args.schedule == 'cosine':
        left = (1 + math.cos(math.pi * epoch / epochs)) / 2
    elif epochs - epoch > tail:
        left = (epochs - tail - epoch) / (epochs - tail)
    else:
        left = (epochs - epoch) / (tail * (epochs - tail))
    rate = args.learning_rate_min + (args.learning_rate - args.learning_rate_min) * left
    return rate * min(1.0, (epoch + 1) / max(1, args.warmup_epochs))


# ---- The folder of a run --------------------------------------------------------------------


class Run:
    """A run's folder: args.json, scripts/, checkpoint.pt with the log in it, log.jsonl, a result.

    run = Run(args, device, 'weights.pt')   UserError if the folder is not of these settings
    run.plan(full)                          sets epochs and steps, if the data give `full` of them
    with run.on(data):                      takes the folder for this process, reads the checkpoint
        run.start(...)                      loads the checkpoint into networks and optimizers
        for epoch in range(run.epoch, run.epochs):
            run.train(...), run.end_epoch(...)      a signal ends the run here, when it is saved

    log.jsonl is written from the log in the checkpoint, one line per epoch. Of several processes
    the first reads and writes; all save and stop at the same step.
    """
    def __init__(self, args, device, result):
        self.args, self.device, self.folder = args, device, Path(args.save)
        self.finished = from_first((self.folder / result).exists())
        self.checkpoint, self.log = {}, []
        self.scripts = own_scripts()            # as they are now: later they may be edited
        if not hasattr(args, 'method'):         # a notebook may have imported it
            self.scripts.pop('search.py', None)
        self.epoch = self.step = self.epochs = 0        # where to go on, and where it ends
        self.caught = self.stop = 0             # the signal that came, that all have agreed on
        if args.amp and device.type == 'cuda' and not torch.cuda.is_bf16_supported(False):
            raise UserError('--amp needs a GPU with bf16, Ampere or newer: leave it out')
        if is_first():
            self.check_folder()
        if self.finished:
            print(f'{self.folder} is finished')

    def check_folder(self):
        """UserError if the folder holds anything but a run of these settings to --resume."""
        about = self.folder / 'args.json'
        if not about.exists():
            if {path.name for path in self.folder.glob('[!.]*')} - {'scripts'}:     # of a kill
                raise UserError(f'{self.folder} holds files of no run: choose another --save')
            return
        if not self.args.resume:
            raise UserError(f'{self.folder} holds a run: --resume it, or choose another --save')
        content, now = read_json(about), vars(self.args)
        before = content['settings']
        # A setting that the scripts got after the run began is compared only if it is typed.
        names = sorted((now.keys() & before.keys() | {*self.args.typed}) - MAY_DIFFER)
        for name in ('seed', *names):           # --seed first: it also changes --data_seed
            if now.get(name) != before.get(name):
                raise UserError(f'{self.folder} was run with --{name} {before.get(name)!s:.60}, '
                                f'not {now.get(name)!s:.60}, by `{content["command"]}`. Give the '
                                'same, or another --save')
        place = before.get('data_dir')
        if self.finished and place not in (None, now.get('data_dir')):      # its data may be others
            print(f'note: {self.folder} was run with --data_dir {place}', file=sys.stderr)
        began = {path.name: path.read_bytes() for path in (self.folder / 'scripts').glob('*.py')}
        changed = [name for name, script in self.scripts.items() if began.get(name) != script]
        if changed:
            print(f'note: changed since {self.folder} began: {", ".join(changed)}', file=sys.stderr)
        # On a GPU only the device matters, on a CPU the rest.
        on_gpu, old = self.device.type == 'cuda', content['hardware']
        for name, value in hardware(self.device).items():
            if not self.finished and value != old.get(name, value) and on_gpu == (name == 'device'):
                print(f'note: {self.folder} began on other hardware ({name}: {old[name]}, now '
                      f'{value}): digits may differ', file=sys.stderr)

    def plan(self, full):
        """Set epochs, steps of an epoch and total, of data that give `full` steps an epoch."""
        self.epochs, self.steps = self.args.epochs, self.args.steps_per_epoch or full
        self.total = self.epochs * self.steps

    @contextlib.contextmanager
    def on(self, data):
        """Hold the run's folder, on a Data or None; read its checkpoint, and catch signals."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / '.lock', 'a') as lock:
            if is_first():
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # workers do not inherit it
                except OSError:
                    raise UserError(f'{self.folder}: wait for another process there') from None
                self.write_args(data)
            path = self.folder / 'checkpoint.pt'
            if is_first() and path.exists():    # other machines may not see it yet
                self.checkpoint = load_file(path, 'delete it to start the run again')
            self.checkpoint = from_first(self.checkpoint)       # the others wait for it
            if self.checkpoint:
                self.log = self.checkpoint['log']
                self.epoch, self.step = self.checkpoint['epoch'], self.checkpoint['step']
            self.write_log()
            interrupt = signal.signal(signal.SIGINT, self.catch)
            terminate = signal.signal(signal.SIGTERM, self.catch)
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, interrupt)
                signal.signal(signal.SIGTERM, terminate)

    def write_args(self, data):
        """Write args.json and scripts/ of a new run; one that goes on must have the same data."""
        about, sha256 = self.folder / 'args.json', None
        if data is not None:
            labels = hashlib.sha256(data.labels.tobytes()).hexdigest()
            sha256 = {'images': data.sha256(), 'labels': labels}
        if about.exists():
            if read_json(about).get('data_sha256') != sha256:
                raise UserError(f'{self.folder} was run on other images or labels: bring them back')
            return
        (self.folder / 'scripts').mkdir(exist_ok=True)
        for name, content in self.scripts.items():
            (self.folder / 'scripts' / name).write_bytes(content)
        write_file(about, json.dumps({
            'command': shlex.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]]),
            'settings': vars(self.args), 'data_sha256': sha256, 'git_commit': git_commit(),
            'code': hashlib.sha256(b''.join(self.scripts.values())).hexdigest()[:6],
            'date': time.strftime('%Y-%m-%d'), 'hardware': hardware(self.device),
            'world_size': num_processes(), 'versions': {'python': platform.python_version(), **{
                name: version(name) for name in ('torch', 'torchvision', 'numpy', 'pillow')}},
        }, indent=1) + '\n')

    def catch(self, signum, _frame):
        # The second one, or one with no step left. Slurm sends two to a process of torchrun.
        is_second = self.caught and 'TORCHELASTIC_RUN_ID' not in os.environ
        if is_second or self.epoch >= self.epochs:
            saved = f': the steps are saved in {self.folder}: run the same with --resume'
            raise KeyboardInterrupt(signum, saved if self.log and not is_second else '')
        self.caught = signum

    def start(self, what, sums, objects, state):
        """Load the checkpoint into `objects`, networks and optimizers, and torch's generators.

        what: the first words that the run prints. sums: (n,) zeros, to which each step adds.
        state(): what the checkpoint holds besides the objects' states and what a Run knows.
        """
        slow = self.device.type == 'cpu' and self.args.preset != 'laptop'
        done = self.epoch * self.steps + self.step
        print(f'{what}, {self.total:,} steps on {num_processes()} x {self.device.type}: '
              f'{self.folder}' + (f'; going on after step {done:,}' if done else '; a new run'))
        self.sums, self.objects, self.state, saved = sums, objects, state, self.checkpoint
        hint = '; --preset laptop or --quick takes minutes' if slow else ''
        self.progress = Progress(self.total, 'steps', done, hint)
        if not saved:
            return
        with readable(f'{self.folder}/checkpoint.pt is of another network', 'Delete it.'):
            for name, target in objects.items():
                content = saved[name]
                if 'param_groups' in content:   # those saved may be for another device
                    content = {**content, 'param_groups': target.state_dict()['param_groups']}
                target.load_state_dict(content)
        rank, processes = world()
        set_random_states(saved['random'][rank % len(saved['random'])], self.device)
        sums = saved['sums']                    # of another number of processes: their mean
        self.sums = (sums[rank] if len(sums) == processes else sums.mean(0)).to(self.device)
        self.sums[1::2] *= len(sums) / processes    # counts of right answers; losses are means

    def train(self, epoch, draws, step_of):
        """Take the steps of an epoch that are left.

        draws: batches, each the arguments of step_of, which returns what the sums get. Sets the
        epoch's seconds and its last batch.
        """
        tensors = list(self.objects['network'].parameters())
        self.saved = time.time()
        began = self.saved - (self.checkpoint['seconds'] if self.step else 0.0)
        for step, batch in zip(range(self.step, self.steps), draws):
            self.sums += step_of(*batch)
            self.progress.update(epoch * self.steps + step + 1, f'epoch {epoch + 1}/{self.epochs}')
            if self.due(epoch, step, [self.sums, *tensors]):
                self.seconds = time.time() - began
                self.save(epoch, step + 1)
        self.batch, self.seconds = batch, time.time() - began

    def end_epoch(self, epoch, line, images):
        """Log an epoch of so many `images`, and save."""
        self.log.append({'epoch': epoch, **line, 'seconds': round(self.seconds, 3),
                         'images_per_second': round(images / max(self.seconds, 1e-9), 1),
                         'peak_memory_mib': peak_memory_mib(self.device)})
        self.progress.close()
        self.sums = torch.zeros_like(self.sums)
        self.save(epoch + 1, 0)                 # before the print, as Ctrl-C may have ended `| tee`
        print(f'epoch {epoch + 1}/{self.epochs}: {summary(line)}')

    def due(self, epoch, step, tensors):
        """Whether to save now. (After the last step of an epoch end_epoch saves.)

        UserError if `tensors` are not finite. A GPU, which would wait, checks every 50 steps.
        Several processes check every 5, because torchrun kills them 30 s after a signal.
        """
        caught, waited, alone = self.caught, time.time() - self.saved, num_processes() == 1
        limit, is_last = 60 * self.args.checkpoint_minutes, step + 1 == self.steps
        urgent = is_last or alone and (caught or waited > limit)
        every = 50 if alone else 5
        if not (urgent or self.device.type == 'cpu' or step % every == every - 1):
            return False
        self.check_finite(tensors, epoch * self.steps + step)
        if not alone:                           # all save and stop at the same step
            flags = torch.tensor([caught, waited], device=self.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            caught, waited = flags.tolist()
        self.stop = int(caught)
        return not is_last and (self.stop > 0 or waited > limit)

    def check_finite(self, tensors, step):
        """UserError if a loss, a weight or an alpha is not finite."""
        norms = torch._foreach_norm([t.detach() for t in tensors])
        if not torch.stack([norm.float() for norm in norms]).isfinite().all():
            raise UserError(f'the loss is not finite at step {step}: lower --learning_rate')

    def save(self, epoch, step):
        """Write checkpoint and log, `step` steps into `epoch`; a signal that came ends the run."""
        content = {name: target.state_dict() for name, target in self.objects.items()}
        content.update(self.state(), epoch=epoch, step=step, log=self.log, seconds=self.seconds,
                       sums=torch.stack(gather(self.sums.cpu())),
                       random=gather(random_states(self.device)))
        if is_first():
            write_file(self.folder / 'checkpoint.pt', content)
        self.epoch, self.step, self.saved = epoch, step, time.time()
        if num_processes() == 1:                # a signal may come after the last step as well
            self.stop = self.caught
        self.write_log()
        if self.stop:
            print(f'saved in {self.folder}: run the same with --resume')
            raise KeyboardInterrupt(self.stop, '')      # see one_line_errors

    def write_log(self):
        if is_first():
            lines = [json.dumps(line) + '\n' for line in self.log]
            write_file(self.folder / 'log.jsonl', ''.join(lines))


def summary(line):
    """What is worth saying of a line of the log."""
    texts = [text.format(line[name]) for name, text in SAID.items() if line.get(name) is not None]
    for name, (header, digits) in metric_columns().items():
        if line.get(name) is not None:
            unit = '%' if header.endswith('%') else ''
            texts.append(f'{header.removesuffix(" %")} {line[name]:.{digits}f}{unit}')
    return ', '.join(texts)


def own_scripts():
    """{name: content} of the scripts of this folder that make the run, by name."""
    files = {Path(getattr(module, '__file__', None) or '.').resolve()
             for module in [*sys.modules.values()]}
    here = Path(__file__).resolve().parent
    return {file.name: file.read_bytes() for file in sorted(here.glob('*.py')) if file in files}


def git_commit():
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
    with contextlib.suppress(OSError):          # there is no git
        return subprocess.run(command, text=True, cwd=Path(__file__).resolve().parent,
                              capture_output=True).stdout.strip() or None


def hardware(device):
    """What a measured number was measured on."""
    names = re.findall(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    return {'cpu': names[-1] if names else platform.machine(), 'threads': torch.get_num_threads(),
            'instructions': torch.backends.cpu.get_cpu_capability(),        # how sums are rounded
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}


def peak_memory_mib(device):
    """Largest memory so far, of the GPU or of this process; None where nothing tells."""
    if device.type == 'cuda':
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    words = Path('/proc/self/status').read_text().split()
    return round(int(words[words.index('VmHWM:') + 1]) / 1024) if 'VmHWM:' in words else None


def random_states(device):
    """States of torch's generators, of the CPU and of the GPU that the run uses."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == 'cuda' else states


def set_random_states(states, device):
    torch.set_rng_state(states[0])
    if device.type == 'cuda' and len(states) > 1:       # else the checkpoint is of a CPU
        torch.cuda.set_rng_state(states[1], device)


# ---- The processes of torchrun --------------------------------------------------------------


def draw_apart(seed):
    """From here on each process but the first draws numbers of its own."""
    if not is_first():
        torch.manual_seed((seed + world()[0] * 1_000_003) % 2 ** 62)


def average(tensors):
    """The mean over all processes of each of some tensors of one type, in one all_reduce."""
    if num_processes() == 1:
        return list(tensors)
    flat = torch.cat([t.detach().flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    parts = (flat / num_processes()).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors)]


def from_first(value):
    """The value, of a plain type or of tensors on the CPU, that the first process has."""
    values = [value]
    if num_processes() > 1:
        torch.distributed.broadcast_object_list(values, 0)
    return values[0]


def start_alike(network):
    """Every process takes the weights, alphas and statistics of the first."""
    if num_processes() > 1:
        for t in network.state_dict().values():
            torch.distributed.broadcast(t, 0)


# ---- The CUDA graph -------------------------------------------------------------------------


class GraphedStep:
    """A training step that CUDA replays as one graph, if that gives what the eager step gives.

    step(*batch) returns a tensor and changes those in changed(), {name: list}, in place. After
    WARM_UP steps a graph is made, and kept if no list is off by more than TOLERANCE of its change.
    """
    WARM_UP, TOLERANCE = 3, 0.05
    works = True                # until a capture fails

    def __init__(self, step, changed, device, on=True):
        self.step, self.changed, self.device = step, changed, device
        self.on, self.calls, self.graph = on and self.works and device.type == 'cuda', 0, None
        # One stream for eager steps and capture: autograd keeps the stream that it met first.
        self.stream = torch.cuda.Stream(device) if self.on else None

    def __call__(self, *batch):
        self.calls += 1
        if self.graph is not None:
            torch._foreach_copy_(self.batch, list(batch))
            self.graph.replay()
            return self.result.clone()
        if not self.on:
            return self.step(*batch)
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            result = self.step(*batch) if self.calls <= self.WARM_UP else self.first_replay(batch)
        torch.cuda.synchronize(self.device)
        return result

    def capture(self):
        """(object with replay(), result): the step, recorded but not run."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: a DataLoader's thread that pins memory must not break it off.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode='thread_local'):
            return graph, self.step(*self.batch)

    def first_replay(self, batch):
        """Take the eager step; then capture and replay it from the same start, and compare."""
        self.on, self.batch, changed = False, [t.clone() for t in batch], self.changed()
        start, before = random_states(self.device), copy.deepcopy(changed)
        result = self.step(*batch)
        end, eager = random_states(self.device), copy.deepcopy(changed)
        try:
            self.put_back(before, start, changed)
            graph, self.result = self.capture()
            set_random_states(start, self.device)
            graph.replay()
            reason = difference(before, changed, eager, self.TOLERANCE)
        except RuntimeError as error:           # or there is no memory for a graph
            reason = f'capture failed ({str(error).splitlines()[0][:100]})'
            GraphedStep.works = False           # the allocator may think that it captures on
            if self.device.type == 'cuda':      # before torch 2.14 the generator may, too
                generator = torch.cuda.default_generators[self.device.index]
                generator.graphsafe_set_state(generator.clone_state())
        self.put_back(eager, end, changed)
        if reason:
            print(f'no CUDA graph: {reason}; going on without', file=sys.stderr)
        self.graph = None if reason else graph
        return result

    def put_back(self, values, states, changed):
        """Give all that a step changes these values, and torch's generators these states."""
        for name, tensors in changed.items():
            for t, value in zip(tensors, values[name]):
                t.data.copy_(value)
                t.grad = None                   # of a capture that broke off
        set_random_states(states, self.device)


@torch.no_grad()
def difference(before, replayed, eager, tolerance):
    """Say how a replayed step differs from the eager one, all {name: tensors}; None if alike."""
    def distance(a, b):
        return math.sqrt(sum((x.double() - y.double()).square().sum().item() for x, y in zip(a, b)))

    for name, tensors in replayed.items():
        off, moved = distance(tensors, eager[name]), distance(before[name], eager[name])
        if not off <= tolerance * moved:        # also if one is not finite
            return f"the {name} differ from the eager step's by {off:.2g} in {moved:.2g}"
    return None


def tensors_of_a_step(network, *optimizers):
    """What GraphedStep compares: {name: tensors}."""
    states = []
    for optimizer in optimizers:
        for state in optimizer.state.values():
            states += [t for t in state.values() if torch.is_tensor(t)]
    return {'weights': network.weights, 'alphas': network.architecture_parameters(),
            'statistics': [b for b in network.buffers() if b.is_floating_point()],
            'optimizers': states}


# ---- Training the network of a genotype -----------------------------------------------------


def train_step(network, batch, optimizer, args):
    """Step the weights; returns loss (without the auxiliary head's) and right answers, (2,).

    The loss and right answers are of this process, the gradients of all of them.
    """
    parts, sums = list(zip(*(t.chunk(args.grad_accum) for t in batch))), 0
    for x, y in parts:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
            logits = network(x)
        logits, auxiliary_logits = logits if args.auxiliary else (logits, None)
        loss = total = loss_of(logits.float(), y, args.label_smoothing)
        if args.auxiliary:
            total = loss + 0.4 * loss_of(auxiliary_logits.float(), y, args.label_smoothing)
        (total / len(parts)).backward()
        sums = sums + torch.stack([loss.detach() / len(parts), correct(logits.detach(), y)])
    if num_processes() > 1:
        # A node that is not in the cell's output gets no gradient.
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        torch._foreach_copy_(grads, average(grads))
    if args.grad_clip:
        torch.nn.utils.clip_grad_norm_(network.parameters(), args.grad_clip, foreach=True)
    optimizer.step()
    optimizer.zero_grad()
    return sums


def make_optimizer(weights, args, name='sgd'):
    """SGD or Adam, whose learning rate is a tensor, so that a CUDA graph sees it change."""
    warnings.filterwarnings('ignore', 'This instance was constructed with capturable')
    cuda, decay = weights[0].is_cuda, args.weight_decay
    rate = torch.tensor(args.learning_rate, device=weights[0].device)
    if name == 'adam':
        return torch.optim.Adam(weights, rate, weight_decay=decay, foreach=cuda, capturable=cuda)
    return torch.optim.SGD(weights, rate, args.momentum, weight_decay=decay, fused=cuda,
                           foreach=not cuda, nesterov=args.nesterov and args.momentum > 0)


def endless(batches, epoch, run):
    """Yield the batches of an epoch from run.step on; after the last, again in another order.

    A run may take more steps than its images give, as PC-DARTS on ImageNet does for the alphas.
    """
    turn, step = divmod(run.step, len(batches))
    while True:
        yield from batches.epoch(epoch, step, turn * run.epochs)
        turn, step = turn + 1, 0


def split_rows(data, args):
    """(images to train on, images of other patients on which the epoch is chosen): int arrays."""
    portion = args.train_portion
    if portion > 1:                             # a number; more than there are: all
        portion /= len(data)
    rows, _ = data.split(np.arange(len(data)), portion, args.seed)
    kept, held = data.split(rows, 1 - args.holdout_patients, args.seed)
    if args.holdout_patients and not len(held):
        raise UserError(f'--holdout_patients {args.holdout_patients} holds out nothing: take more')
    return kept, held


def parse(argv):
    """Settings as a namespace: typed, over --quick, over the preset, over DARTS's."""
    def defaults_for(typed, chosen, preset):
        if chosen['preset'] == 'auto' and preset == 'cifar' and chosen['arch'] \
                and isinstance(find_genotype(chosen['arch'])[0], str):
            preset = 'nb201'
        out = {**FIXED, **PRESETS[preset]}
        if preset == 'laptop' and chosen['data'] == 'chexpert':
            out['holdout_patients'] = 0.1       # later epochs fit few X-rays too well
        if chosen['quick']:
            out.update(QUICK, num_classes=min(out.get('num_classes', 10), 20), rate_for=None)
            if out['optimizer'] == 'sgd':
                out['learning_rate'] = 0.05
        return out

    tables = {'network': NETWORK, 'data': INPUT, 'recipe': {**RECIPE, **SCHEDULE}}
    args, typed = settle(__doc__, tables, argv, PRESETS, defaults_for)
    if not args.arch:
        raise UserError('give --arch: a published name, a genotype.json or a search')
    genotype, _ = find_genotype(args.arch)
    if isinstance(genotype, str) and (args.layers < 5 or args.layers % 3 != 2):
        raise UserError(f'--layers {args.layers}: NAS-Bench-201 has 3 N + 2: take 5, 8, 11, ...')
    args.genotype = to_json(genotype)           # a resumed run has the same
    if args.optimizer == 'adam':
        refuse_idle(typed, {'momentum'})
    args.save = args.save or run_name('retrain', [args.data, args.arch], args, typed)
    return args


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = choose_device(args.gpu, args.tf32)
    run = Run(args, device, 'weights.pt')
    if run.finished:                            # a loop goes on without reading the data
        log = read_log(run.folder)
        if log:
            say(args, log[-1])
        return

    # Data: images to train on, to choose the epoch on, to measure the fit on, and to test on.
    data = find_or_make(args.data, vars(args))
    genotype, found_by = find_genotype(args.arch)
    stem = stem_for(args.stem, data.image_size, args.auxiliary)
    if args.label_smoothing and data.multilabel:
        raise UserError('--label_smoothing does not go with several labels an image: give 0')
    rows, held = split_rows(data, args)
    size = batch_of(args, len(rows))
    batches = Batches(data, rows, size, device, args.augment, args.cutout, 2 * args.seed,
                      workers=args.workers)
    run.plan(len(batches))
    fit_rows = rows[evenly(len(rows), 1000 if args.quick else FIT_IMAGES)]
    test_data = read(args.data, vars(args), 'test') if data.kind == 'real' else None

    with run.on(data):
        torch.manual_seed(args.seed)
        network = Network(args.init_channels, len(data.classes), args.layers, genotype,
                          auxiliary=args.auxiliary, stem=stem).to(device)
        start_alike(network)
        network.drop_path_prob = torch.zeros((), device=device) if args.drop_path_prob else None
        optimizer = make_optimizer(list(network.parameters()), args, args.optimizer)
        draw_apart(args.seed)                               # drop-path
        kept = run.checkpoint.get('kept', {})               # weights of the best held-out epoch
        run.start(f'{args.arch} (C={args.init_channels}) on {data.name} ({len(rows):,} images of '
                  f'{data.image_size} px, {len(data.classes)} classes, batch {size})',
                  torch.zeros(2, device=device),            # loss and right answers
                  dict(network=network, optimizer=optimizer), lambda: dict(kept=kept))
        step = GraphedStep(lambda *batch: train_step(network, batch, optimizer, args),
                           lambda: tensors_of_a_step(network, optimizer), device,
                           args.graph == 'auto' and num_processes() == 1)
        for epoch in range(run.epoch, run.epochs):
            learning_rate = learning_rate_at(args, epoch, run.epochs)
            optimizer.param_groups[0]['lr'].fill_(learning_rate)
            drop_path_prob = args.drop_path_prob * epoch / run.epochs
            if drop_path_prob:
                network.drop_path_prob.fill_(drop_path_prob)
            network.train()
            run.train(epoch, endless(batches, epoch, run), step)
            start_alike(network)                # with the running statistics of the first process
            loss, right = average([run.sums])[0].div(run.steps).tolist()
            line = {'learning_rate': learning_rate, 'drop_path_prob': drop_path_prob,
                    'train_loss': loss, 'train_accuracy': right * num_processes() / size}
            if data.multilabel:                 # zeros for all labels are right nearly always
                line['train_accuracy'] = None
            is_last = epoch + 1 == run.epochs
            if len(held):
                line.update(test('holdout', network, data, held, device, args.workers))
                bad = [badness(epoch_line) for epoch_line in (*run.log, line)]
                # The best so far; or NaN, which check_finite refuses below.
                if not bad[-1] >= min(bad[:-1], default=math.inf):
                    kept = {name: t.cpu().clone() for name, t in network.state_dict().items()}
                if is_last:                     # the log's last line describes weights.pt
                    network.load_state_dict(kept)
                    line.update(test('holdout', network, data, held, device, args.workers),
                                kept_after_epochs=bad.index(min(bad)) + 1)
            if test_data:
                tested = evenly(len(test_data), 1000 if args.quick else len(test_data))
                line.update(test('test', network, test_data, tested, device, args.workers))
            if is_last:                         # without augmentation, in evaluation mode
                line.update(test('fit', network, data, fit_rows, device, args.workers))
            measured = [line.get(f'{part}_loss', 0.0) for part in ('holdout', 'test', 'fit')]
            run.check_finite([torch.tensor(measured)], (epoch + 1) * run.steps)
            run.end_epoch(epoch, line, run.steps * size)
        if is_first():
            finish(run, args, data, test_data, stem, genotype, found_by,
                   kept or network.state_dict())


def badness(line):
    """By what an epoch is chosen on held-out images: the error, or 1 - AUROC, or the loss."""
    for name in ('holdout_auroc_tasks', 'holdout_auroc'):
        if line.get(name) is not None:
            return 1 - line[name]
    return line.get('holdout_error', line['holdout_loss'])


def finish(run, args, data, test_data, stem, genotype, found_by, weights):
    """Write weights.pt, and say what came out and what comes next."""
    meta = dict(
        arch=args.arch, genotype=plain(genotype), found_by=found_by,
        init_channels=args.init_channels, layers=args.layers, auxiliary=args.auxiliary, stem=stem,
        classes=data.classes, mean=data.mean, std=data.std, image_size=data.image_size,
        zoom=data.zoom, multilabel=data.multilabel, has_test=test_data is not None,
        test_sha256=test_data.sha256() if test_data else None,
        data=args.data if args.data in REAL else str(Path(args.data).resolve()),
        settings={**vars(args), 'data_dir': str(Path(args.data_dir).resolve()), 'download': False})
    write_file(run.folder / 'weights.pt', {'network': weights, 'meta': meta})
    say(args, run.log[-1])


def say(args, line):
    """Print the result, from the log's last line, and the next command."""
    said = {name: line[name] for name in line if not name.startswith('train_')}
    print('result:', summary(said))
    if args.quick:
        print('this was --quick, tested on 1,000 images at most: the result means little')
    gpu = ['--gpu', str(args.gpu)] if args.gpu else []
    script = os.path.relpath(Path(__file__).with_name('evaluate.py'))
    print('next:', shlex.join(['python', script, args.save, *gpu]))


if __name__ == '__main__':
    leave(main())
