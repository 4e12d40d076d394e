"""Write unreal data sets, and read every data set: unreal, CIFAR, ImageNet, CheXpert, a folder.

    python generate_data.py --kind noise --out data/noise             # 50,000 x 32 px, seconds
    python generate_data.py --kind random_labels --source cifar10 --out data/random_labels
    python generate_data.py --kind generated --out data/generated     # fractals, about a minute
    python generate_data.py --kind generated --generator train --source cifar10 --out data/learned
    python generate_data.py --kind noise --num_images 1000 --out data/small     # a second

`noise` is Gaussian pixels with random labels. `random_labels` is new labels for the images of a
source, which stay where they are. `generated` draws an image for each label, by a formula or by a
network that is trained on a source (train). A source is cifar10, cifar100, imagenet or chexpert
under --data_dir, a written set, or a folder with a folder of images for each class.

A set appears when it is complete, so you can simply repeat a run that was stopped.
`--generator train` keeps its training in OUT.generator/ and goes on from there.
"""
import argparse
import atexit
import contextlib
import csv
import ctypes
import difflib
import fcntl
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

# Idle threads of OpenMP spin before they sleep. Long spinning takes the cores from other runs: two
# searches at once are then many times as slow. OpenMP reads this when torch is loaded.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageOps  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

RESIDENT = 2 << 30              # bytes: smaller sets live on the device, larger ones are streamed
AT_ONCE = 100_000               # if a set has more files, each is read when it is needed


# ---- Settings: tables of defaults, from which every script makes its flags ------------------


class Setting(NamedTuple):
    """A flag: its default, words for --help, its values: a list or a function of text."""
    default: object         # False: a switch; []: positional arguments
    help: str
    values: object = str
    alone: object = None    # what the flag means without a value after it


def number(convert, low, high=2 ** 62):
    """Values of a Setting: numbers from low to high, by `convert`, int or float."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = convert(text)
            if low <= value <= high:
                return value
        what = 'whole number' if convert is int else 'number'
        end = f' to {high}' if high < 2 ** 62 else ''
        raise argparse.ArgumentTypeError(f'{text[:40]!r} is no {what} from {low}{end}')
    return parse


def name_or_path(text):
    """Values of a Setting: a folder has one name, but ./cifar10 is no cifar10."""
    path = os.path.normpath(text)
    return path if '/' in path else text.rstrip('/')


def parse_flags(doc, tables, argv=None, defaults_for=lambda typed, chosen: {}):
    """(settings, what was typed, defaults) of a command line, each {name: value}.

    tables: {title: {name: Setting}}. defaults_for(typed, chosen) returns the defaults of the
    method, the preset and so on, where `chosen` is what was typed over the tables. --help shows
    them.
    """
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30,
                               width=100)
    examples = [line for line in doc.split('\n') if line.startswith('    ')]
    parser = argparse.ArgumentParser(
        description=doc.split('\n')[0], usage='%(prog)s [flags]', add_help=False,
        epilog='\n'.join(['examples:', *examples]),
        argument_default=argparse.SUPPRESS, allow_abbrev=False, formatter_class=layout)

    def refuse(message):            # in one line, where argparse would print a page of usage
        unknown = re.findall('unrecognized arguments: (--[^ =]+)', message) or ['']
        near = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1, 0.7)
        hint = f'did you mean {near[0]}?' if near else 'see --help'
        raise UserError(f'{message} ({hint})')

    parser.error = refuse
    parser.add_argument('-h', '--help', action='store_true', help='show this and end')
    defaults = {}
    for title, table in tables.items():
        group = parser.add_argument_group(title)
        for name, (default, text, values, alone) in table.items():
            defaults[name] = default
            if values is str and isinstance(default, (int, float)):
                values = type(default)
            flag, how = f'--{name}', {'type': values, 'metavar': 'X'}
            if default == []:
                flag, how = name, {'nargs': '*'}
            elif isinstance(default, bool):
                how = {'action': 'store_true'}
            elif isinstance(values, list):
                text, how = f'{", ".join(values)}: {text}', {'choices': values, 'metavar': 'X'}
            elif alone is not None:
                how.update(nargs='?', const=alone)
            group.add_argument(flag, help=text.replace('%', '%%'), **how)
    typed = vars(parser.parse_intermixed_args(argv))
    defaults.update(defaults_for(typed, {**defaults, **typed}))
    if 'help' in typed:
        for action in parser._actions:
            value = str(defaults.get(action.dest))
            if value not in ('None', 'False', '[]'):
                action.help = f'{action.help} ({value})'
        parser.print_help()
        raise SystemExit(0)
    return {**defaults, **typed}, typed, defaults


# ---- User errors, files, progress, device: the ground of every script -----------------------


class UserError(Exception):
    """Something the user can mend. The text is one line: the thing, what is wrong, the mend."""


def one_line_errors(main):
    """main(argv=None) -> exit status; what the user can mend is one line and status 2."""
    @functools.wraps(main)
    def wrapped(argv=None):
        with contextlib.suppress(AttributeError):       # a notebook's has no such method
            # So that a log file grows by lines, and takes names of files that are not UTF-8.
            sys.stdout.reconfigure(line_buffering=True, errors='surrogateescape')
        try:
            return main(argv) or 0
        except UserError as error:
            message = str(error)
        except (torch.OutOfMemoryError, MemoryError):
            message = 'out of memory: take a smaller --batch_size, or fewer or smaller images'
        except RuntimeError as error:
            if 'DataLoader worker (pid' not in str(error):
                raise
            message = 'a worker was killed, perhaps for its memory: take fewer --workers'
        except BrokenPipeError:                 # the reader of a pipe has gone, as `head` does
            return 141
        except OSError as error:
            message = f'{error.filename or "a file"}: {error.strerror or error}. Check the path, ' \
                      'the permissions of its folder, and the free space.'
        except KeyboardInterrupt as error:      # Run.catch gives its signal, and a hint
            signum, hint = error.args or (signal.SIGINT, '')
            if is_first():
                print(f'\nstopped{hint}', file=sys.stderr)
            return 128 + signum
        print(f'{Path(main.__globals__["__file__"]).name}: error: {message}', file=sys.stderr)
        return 2
    return wrapped


def leave(status):
    """End the script; above 128 by that signal, so that a loop in a shell stops too."""
    kill_workers()
    if status > 128:
        signal.signal(status - 128, signal.SIG_DFL)
        os.kill(os.getpid(), status - 128)
    if num_processes() > 1:                     # torch's threads sometimes abort an orderly end
        if status == 0:
            torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def write_file(path, content):
    """Write text, bytes, or anything else by torch.save. A kill leaves the old or the new file."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    if isinstance(content, str):
        content = content.encode(errors='surrogateescape')      # names of files may be any bytes
    elif not isinstance(content, bytes):    # in memory first: torch hides that a disk is full
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)          # which a full disk does not say
        raise
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path, mend):
    """The dictionary that write_file wrote; UserError, with the mend, if one bit has changed."""
    with readable(f'{path} is missing or damaged', f'To go on: {mend}.'), \
            zipfile.ZipFile(path) as file:
        if file.testzip():                          # torch.load looks at no checksum
            raise ValueError('other checksum')
        return torch.load(path, map_location='cpu', weights_only=True)


@contextlib.contextmanager
def readable(what, mend):
    """Turn any error in the block into a UserError with the text `what (error). mend`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f'{what} ({why}). {mend}') from None


def world():
    """(rank, number) of the processes that share this run, torchrun's; (0, 1) without it."""
    group = torch.distributed
    shared = group.is_available() and group.is_initialized()
    return (group.get_rank(), group.get_world_size()) if shared else (0, 1)


def num_processes():
    """How many processes share this run."""
    return world()[1]


def is_first():
    """Whether this is the first process of the run, which prints and writes its files."""
    return world()[0] == 0


class Progress:
    """A line with what is done, the rate and the time left; in a log file a new one every 8 s.

    If `hint` is not None, it says once, after 3 s, when the work will end, if more than a minute is
    left. Above an hour the hint follows: how to make it shorter.
    """
    last = time.monotonic()                     # when one of them wrote a line

    def __init__(self, total, unit, done=0, hint=None):
        self.total, self.unit, self.first, self.hint = total, unit, done, hint
        self.start, self.terminal = time.monotonic(), sys.stderr.isatty()

    def update(self, done, text=''):
        """done: units in all, counted from the very start; text: shown at the end of the line."""
        now, count = time.monotonic(), done - self.first
        spent = now - self.start
        if not is_first() or not count or spent < 1:        # short work prints nothing
            return
        each = spent / count
        left = timedelta(seconds=round(each * (self.total - done)))
        if self.hint is not None and spent > 3:
            if left.total_seconds() > 60:
                end = datetime.now() + left
                print(f'about {left} left for the {self.unit}, until {end:%a %d %b, %H:%M}'
                      + (self.hint if left.total_seconds() > 3600 else ''))
            self.hint = None
        if now - self.last < (0.2 if self.terminal else 8 - each):
            return
        Progress.last = now
        rate = f'{1 / each:,.1f}/s' if each < 1 else f'{each:.1f} s each'
        line = f'{done:,}/{self.total:,} {self.unit}  {rate}  {left} left'
        with contextlib.suppress(BrokenPipeError):      # Ctrl-C has ended `| tee` before the save
            print(f'{line}  {text}'.ljust(78)[:118], end='\r' if self.terminal else '\n',
                  file=sys.stderr)

    def over(self, items):
        """Yield the items; each is a unit, done when the next one is asked for."""
        for done, item in enumerate(items, 1):
            yield item
            self.update(done)
        self.close()

    def close(self):
        if self.terminal and is_first():
            print(' ' * 118, end='\r', file=sys.stderr, flush=True)


def choose_device(gpu, tf32=False):
    """torch.device for --gpu: CUDA, or the CPU for -1 and on a machine without CUDA.

    Under torchrun each process takes the device of its local rank, and joins the others.
    """
    # glibc would give large blocks back to the system at once and fault them in again on the next
    # step: keeping them saves up to a half of the time of memory-bound calls on a CPU.
    with contextlib.suppress(AttributeError):       # another system than Linux
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)                        # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)                  # M_TRIM_THRESHOLD
    set_tf32(tf32)
    cuda, shared = gpu >= 0 and torch.cuda.is_available(), int(os.environ.get('WORLD_SIZE', 1)) > 1
    device = torch.device('cpu')
    if cuda:
        gpu = int(os.environ['LOCAL_RANK']) if shared else gpu
        device = torch.device('cuda', gpu)
        torch.backends.cudnn.deterministic = True
        with readable(f'--gpu {gpu} cannot be used', 'Use another one, or -1 for the CPU.'):
            torch.cuda.set_device(gpu)
    if shared and num_processes() == 1:
        # torchrun keeps its store when it starts the processes again: without a prefix they would
        # find the addresses of those that died.
        store, rank, processes = next(torch.distributed.rendezvous('env://'))
        # Several machines count differently. With README's variable each start has a new store.
        one_machine = os.environ.get('GROUP_WORLD_SIZE', '1') == '1'
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_machine else '0'
        torch.distributed.init_process_group(
            'nccl' if cuda else 'gloo', timeout=timedelta(hours=1), rank=rank,
            world_size=processes, store=torch.distributed.PrefixStore(attempt, store),
            device_id=device if cuda else None)
        if not is_first():                      # one process speaks
            sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
    if gpu >= 0 and not cuda and is_first():
        print(f'no CUDA on this machine: --gpu {gpu} runs on the CPU '
              f'({torch.get_num_threads()} threads)', file=sys.stderr)
    return device


def set_tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


# ---- Settings of data -----------------------------------------------------------------------

# How far images stray from their class (1: as published) and their background's deviation
DIFFICULTY = {'easy': (0.5, 0.08), 'medium': (1.0, 0.15), 'hard': (1.3, 0.17)}
DATA = {
    'data_dir': Setting('data', 'folder of the real data sets'),
    'download': Setting(False, 'let torchvision fetch CIFAR'),
    'image_size': Setting(None, 'pixels; else 32, or the size of the data', number(int, 8, 4096)),
    'data_seed': Setting(None, "of unreal data; without it the run's seed", number(int, 0)),
    'num_images': Setting(50000, 'of an unreal set', number(int, 1, 10 ** 9)),
    'num_classes': Setting(10, 'of an unreal set', number(int, 2, 10 ** 6)),
    'multilabel': Setting(False, 'labels of 0 or 1: of noise and fractals'),
    'source': Setting('cifar10', 'its images get new labels, or train a generator', name_or_path),
    'label_mode': Setting('uniform', 'how labels are drawn', ['uniform', 'balanced', 'permute']),
    'label_noise': Setting(1.0, 'share of true labels that is drawn anew', number(float, 0, 1)),
    'generator': Setting('fractal', 'what draws generated images',
                         ['fractal', 'spectrum', 'deadleaves', 'train']),
    'fresh': Setting(0, 'draw the images anew after so many epochs; 0: never', number(int, 0), 1),
    'difficulty': Setting('medium', 'of generated images', list(DIFFICULTY)),
    'uncertain': Setting('mixed', 'what -1.0 of CheXpert becomes in training; mixed: ones for '
                         'Atelectasis and Edema, else zeros', ['mixed', 'ones', 'zeros', 'ignore']),
    'test_fraction': Setting(0.2, 'of pictures without val/, held out', number(float, 0, 1)),
    'skip_broken': Setting(False, 'leave out of folders the pictures that cannot be read'),
    'views': Setting('frontal', 'of CheXpert', ['frontal', 'all'])}
DEFAULTS = {name: setting.default for name, setting in DATA.items()}


class Kind(NamedTuple):
    """A kind of unreal data, or a generator."""
    make: object            # make(settings, device) -> Made
    settings: str           # names of the DATA that it takes, beside image_size and data_seed
    augment: bool = False   # whether Batches' augment='auto' augments it


class Made(NamedTuple):
    """What a Kind makes, for make_set."""
    labels: np.ndarray      # int64 (N,), or with several labels uint8 (N, classes) of 0 and 1
    classes: list           # names
    chunks: object          # the images in order: an iterator of uint8 (n, H, W, 3)
    draw: object = None     # for --fresh: draw(places) -> uint8 (n, H, W, 3), also beyond the N
    meta: dict = {}         # more for meta.json; mean and std in it replace the computed ones
    source: object = None   # the Data that has the images, instead of chunks


def settings_of(name, s):
    """Names of the settings that `--data name` uses."""
    names = {'data_dir', 'download', 'image_size'}
    if name in KINDS:
        names |= {'data_seed', *kind_of(name, s).settings.split()}
    if Path(name, 'meta.json').exists():
        names.add('fresh')
    origin = s['source'] if 'source' in names else name
    if origin == 'chexpert':
        names |= {'uncertain', 'views'}
    elif origin not in (*KINDS, *REAL) and not Path(origin, 'meta.json').exists():
        names |= {'test_fraction', 'skip_broken'}
    return names


def kind_of(name, s):
    """The Kind of a set; of generated data that of its generator."""
    return GENERATORS[s['generator']] if name == 'generated' else KINDS[name]


def refuse_idle(typed, idle, where='beside the other flags'):
    """UserError for the first flag that was typed and is among `idle`, which have no effect."""
    names = typed.keys() & idle
    if names:
        raise UserError(f'--{min(names)} means nothing {where}. Leave it out.')


# ---- Noise and random labels ----------------------------------------------------------------
# Only integers of Philox (Salmon et al., SC 2011) and a fixed table are used, so that a seed gives
# the same bytes on every machine and with every chunk size.

PIXELS, LABELS, CHOICE = 0, 1, 2          # independent streams of one seed


def philox(seed, stream, places, n):
    """uint64 (len(places), n): n integers for each place. Philox makes four at a time."""
    blocks, raw = -(-n // 4), []
    for row in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):      # places in a row
        bits = np.random.Philox([seed, stream]).advance(int(row[0]) * blocks)
        raw.append(bits.random_raw(len(row) * blocks * 4))
    return np.concatenate(raw).reshape(len(places), -1)[:, :n]


# A uniform 16-bit number -> a pixel of N(127.5, 32), clipped at 0 and 255, 3.98 deviations away
GAUSS = statistics.NormalDist(127.5, 32)
THRESHOLDS = [round(65536 * GAUSS.cdf(pixel + 0.5)) for pixel in range(255)]
NORMAL = np.searchsorted(THRESHOLDS, np.arange(65536), side='right').astype(np.uint8)


def uint16s(seed, stream, places, n):
    """uint16 (len(places), n): n numbers for each place."""
    return philox(seed, stream, places, -(-n // 4)).view(np.uint16)[:, :n]


def uniforms(seed, stream, places, n):
    """float64 (len(places), n) between 0 and 1: n numbers for each place."""
    return ((philox(seed, stream, places, n) >> np.uint64(40)) + 0.5) / 2 ** 24


def noise_images(seed, places, size):
    """uint8 (len(places), size, size, 3): images of the endless noise of a seed."""
    draws = uint16s(seed, PIXELS, places, size * size * 3)
    return NORMAL[draws].reshape(-1, size, size, 3)


def draw_labels(seed, num_images, num_classes, mode='uniform', true=None, multilabel=False):
    """Random labels: int64 (n,), or uint8 (n, classes) multilabel.

    uniform: every class (or 0 and 1) equally likely; balanced: equally often; permute: the true
    labels, or rows of labels, in random order.
    """
    if mode == 'permute':
        return true[np.argsort(philox(seed, LABELS, [0], num_images)[0], kind='stable')]
    columns, values = (num_classes, 2) if multilabel else (1, num_classes)
    raw = philox(seed, LABELS, [0], num_images * columns).reshape(num_images, columns)
    if mode == 'balanced':
        raw = np.argsort(np.argsort(raw, 0, kind='stable'), 0, kind='stable').astype(np.uint64)
    labels = raw % np.uint64(values)
    return labels.astype(np.uint8) if multilabel else labels[:, 0].astype(np.int64)


def redraw_labels(true, num_classes, seed, mode, label_noise):
    """The true labels with a share `label_noise` of them, chosen by seed, drawn anew."""
    count = round(label_noise * len(true))
    chosen = np.sort(np.argsort(philox(seed, CHOICE, [0], len(true))[0], kind='stable')[:count])
    labels = true.copy()
    labels[chosen] = draw_labels(seed, count, num_classes, mode, true[chosen], true.ndim == 2)
    return labels


def noise(s, device):
    """Made: Gaussian pixels with mean 127.5 and deviation 32, and random labels."""
    if s['label_mode'] == 'permute':
        raise UserError('--label_mode permute: noise has no true labels. Use balanced.')
    size, seed, n = s['image_size'], s['data_seed'], s['num_images']
    labels = draw_labels(seed, n, s['num_classes'], s['label_mode'], multilabel=s['multilabel'])
    step = max(1, (32 << 20) // (size * size * 3))
    chunks = (noise_images(seed, range(n)[k:k + step], size) for k in range(0, n, step))
    return Made(labels, [str(k) for k in range(s['num_classes'])], chunks,
                functools.partial(noise_images, seed, size=size),
                {'mean': [0.5] * 3, 'std': [32 / 255] * 3})


def random_labels(s, device):
    """Made: new labels for the images of a source."""
    source = read(s['source'], s)
    labels = redraw_labels(source.labels, len(source.classes), s['data_seed'], s['label_mode'],
                           s['label_noise'])
    return Made(labels, source.classes, None, meta={'source': s['source']}, source=source)


# ---- Images drawn by formulas ---------------------------------------------------------------
# All that is drawn at random comes from Philox, by the place of an image in the set; torch does the
# drawing, always in the same chunks, so that any slice can be made by itself: the same bytes on
# machines of one type with one version of torch.

BANK, DRAWS, FIELD, ROLLS = 3, 4, 5, 6      # more streams of a seed; glyph j adds 10 (j + 1)
SETTLE, ROUNDS = 16, 48                     # moves of a point before it counts, and in all
LEAVES = 128
# Labels of CheXpert, and the share of its training images that have them (arXiv 1901.07031)
CHEXPERT = {'No Finding': .0886, 'Enlarged Cardiomediastinum': .0481, 'Cardiomegaly': .1226,
            'Lung Opacity': .4939, 'Lung Lesion': .0365, 'Edema': .2606, 'Consolidation': .0678,
            'Pneumonia': .0244, 'Atelectasis': .1563, 'Pneumothorax': .0923,
            'Pleural Effusion': .4034, 'Pleural Other': .013, 'Fracture': .0387,
            'Support Devices': .564}


def formula_images(s, device):
    """Made: images that a formula draws for labels; with several labels grey glyphs."""
    n, classes, seed = s['num_images'], s['num_classes'], s['data_seed']
    labels, names = draw_labels(seed, n, classes, 'balanced'), [str(k) for k in range(classes)]
    if s['multilabel']:
        shares = np.resize(list(CHEXPERT.values()), classes)
        labels = (uniforms(seed, LABELS, range(n), classes) < shares).astype(np.uint8)
        names = list(CHEXPERT) if classes == len(CHEXPERT) else names
    formula = Formula(s['generator'], labels, classes, s['image_size'], seed, s['difficulty'])
    return Made(labels, names, formula.chunks(), formula)


class Formula:
    """Draws images: `name` is fractal, spectrum or deadleaves, as its method.

    labels: int64 (N,); or uint8 (N, classes): then each that is present adds a grey fractal. Beyond
    the N places of the set they repeat. The methods draw float (B, 3, size, size), from about 0 to
    1, of labels (B,), u (B, 32) uniform numbers, rolls (B, n) numbers of 16 bits and noise (B, 2,
    size, size) normal.
    """
    def __init__(self, name, labels, num_classes, size, seed, difficulty='medium'):
        self.labels, self.size, self.seed = labels, size, seed
        self.draw_one_label = getattr(self, name)
        self.jitter, self.contrast = DIFFICULTY[difficulty]
        self.chunk = max(8, 2 ** 15 // size ** 2)
        self.systems = 8 if num_classes < 1000 else 1           # fractals of a class
        if name == 'fractal':
            self.maps, self.table = fractal_bank(seed, num_classes * self.systems)
        # For each class a point of the unit cube, far from the others: Roberts's R sequence, by
        # the root of x^9 = x + 1
        steps = np.outer(np.arange(1, num_classes + 1), 1.085070245491451 ** -np.arange(1.0, 9))
        self.points = torch.from_numpy((uniforms(seed, BANK, [0], 8) + steps) % 1).float()
        # How far slope, stretch and turn of spectrum stray: less if the points are closer
        self.strays = torch.tensor([0.17, 0.17, 0.085]) * self.jitter \
            * (10 / max(10, num_classes)) ** (1 / 3)
        normal = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
        self.normal = normal.float().numpy()                    # of a number of 16 bits

    def chunks(self):
        """The images of the set, uint8 (n, size, size, 3) at a time."""
        threads, n = torch.get_num_threads(), len(self.labels)
        parts = [range(n)[k:k + self.chunk] for k in range(0, n, self.chunk)]
        try:
            with ThreadPoolExecutor(threads, None, torch.set_num_threads, (1,)) as pool:
                for k in range(0, len(parts), threads):         # not all at once, for the memory
                    yield from list(pool.map(self.draw, parts[k:k + threads]))
        finally:
            torch.set_num_threads(threads)

    def __call__(self, places):
        """Images at any places, filled up to 64, so that none depends on what is drawn with it."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)                # no pool: in a worker MKL may hang in a new thread
        images = self.draw(np.resize(places, 64 * math.ceil(len(places) / 64)))
        torch.set_num_threads(threads)
        return images[:len(places)]

    def draw(self, places):
        """uint8 (len(places), size, size, 3), by one thread: more would change last digits."""
        s, places = self.size, np.asarray(places)
        labels = torch.from_numpy(self.labels[places % len(self.labels)])
        u, rolls = self.random(places)
        noise = torch.from_numpy(self.normal[uint16s(self.seed, FIELD, places, 2 * s * s)])
        noise = noise.view(-1, 2, s, s)
        if labels.ndim == 2:
            x = self.glyphs(labels, background(u, noise, self.contrast), places)
        else:
            x = self.draw_one_label(labels, u, rolls, noise)
        return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()

    def random(self, places, stream=0):
        """(B, 32) numbers between 0 and 1, never 1 itself, and (B, n) of 16 bits."""
        u = torch.from_numpy(uniforms(self.seed, DRAWS + stream, places, 32)).float()
        n = ROUNDS * 8 * self.size
        rolls = uint16s(self.seed, ROLLS + stream, places, n).astype(np.int32)
        return u.clamp(max=1 - 2 ** -24), torch.from_numpy(rolls)   # 1: the largest, rounded

    def fractal(self, labels, u, rolls, noise):
        """A fractal of each label over a background."""
        return self.add_fractal(background(u, noise, self.contrast), labels, u, rolls, 0.5, 0.45)

    def add_fractal(self, x, labels, u, rolls, centre, reach):
        """The images x with a fractal of each label in front: see fractal_opacity."""
        system = labels * self.systems + (u[:, 0] * self.systems).long()
        opacity = fractal_opacity(self.maps[system], self.table[system], u, rolls, self.size,
                                  self.jitter, centre, reach)
        colour = hsv(u[:, 8], 0.2 + 0.7 * u[:, 9], 0.8 + 0.2 * u[:, 10])
        return x + opacity * (colour[:, :, None, None] - x)

    def glyphs(self, labels, x, places):
        """Small fractals of all labels that are present over the grey background x."""
        x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1).clone()
        for j in range(labels.sum(1).max()):            # the j-th label of those that have it
            rows = (labels.sum(1) > j).nonzero()[:, 0]
            label = (labels[rows].cumsum(1) <= j).sum(1)
            u, rolls = self.random(places[rows.numpy()], 10 * (j + 1))
            u[:, 9] = -0.2 / 0.7                        # so that its saturation is 0: white
            centre = 0.2 + 0.6 * u[:, 11:13]
            x[rows] = self.add_fractal(x[rows], label, u, rolls, centre, 0.18)
        return x

    def spectrum(self, labels, u, rolls, noise):
        """Gaussian fields with power 1/f^slope, stretched along an angle, between two colours."""
        place = self.points[labels, :3] + self.strays * (2 * u[:, :3] - 1)
        slope, stretch, turn = place.unbind(1)
        angle = math.pi / 2 * turn * (1 - 2 * (u[:, 10] < 0.5).float())     # flips keep the class
        x = smooth_field(noise[:, :1], 0.8 + 2.7 * slope, 8 ** (0.1 + stretch), angle)
        x = x + 4 * self.contrast * smooth_field(noise[:, 1:], 2 + u[:, 3])
        x = torch.sigmoid(1.7 * x / x.std((2, 3), keepdim=True))
        dark = hsv(u[:, 4], u[:, 5], 0.35 * u[:, 6])[:, :, None, None]
        light = hsv(u[:, 7], 0.6 * u[:, 8], 0.7 + 0.3 * u[:, 9])[:, :, None, None]
        return dark + x * (light - dark)

    def deadleaves(self, labels, u, rolls, noise):
        """Shapes that cover one another (arXiv 2106.05963), more small ones than large ones."""
        exponent = 8 * self.points[labels, 3] + 0.2 * self.jitter * (2 * u[:, 0] - 1)
        exponent = torch.where((exponent - 1).abs() < 0.01, 1.01, exponent)     # published: 3
        shares = self.points[labels, 4:].log().abs() ** 3       # one or two shapes prevail
        edges = (shares / shares.sum(1, keepdim=True)).cumsum(1)[:, None, :3]
        draws = ((rolls[:, :8 * LEAVES].view(-1, 8, LEAVES) + 0.5) / 65536).unbind(1)
        shape = (draws[1][..., None] > edges).sum(-1)
        low, high, power = 0.03, 0.5, (1 - exponent)[:, None]   # radius / size of the image
        radius = (low ** power + draws[0] * (high ** power - low ** power)) ** (1 / power)
        fine = 2 * self.size if self.size < 128 else 3 * self.size // 2
        leaves = torch.stack([shape, fine * radius, 2 * math.pi * draws[2],
                              fine * (1.2 * draws[3] - 0.1), fine * (1.2 * draws[4] - 0.1)], 2)
        hue = (u[:, 1:2] + 0.35 * (draws[5] - 0.5)) % 1         # a palette for each image
        colours = (255 * hsv(hue, u[:, 2:3] * draws[6], 0.15 + 0.8 * draws[7])).byte()
        images = [draw_leaves(*image, fine) for image in zip(leaves.tolist(), colours.tolist())]
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        x = F.adaptive_avg_pool2d(x, self.size)
        return x + self.contrast / 3 * smooth_field(noise[:, :1], 2 + u[:, 3])


def draw_leaves(leaves, colours, size):
    """uint8 (size, size, 3) of leaves (shape, radius, angle, x, y) in px, the first in front."""
    # Shape 0 is a disc, 1 a ring, 2 a triangle, 3 a bar.
    corners = {2: [0.5, 7 / 6, 11 / 6], 3: [0.045, 0.955, 1.045, -0.045]}       # angles / pi
    image = Image.new('RGB', (size, size), tuple(colours[-1]))
    pen = ImageDraw.Draw(image)
    for (shape, r, angle, x, y), colour in zip(leaves[::-1], colours[::-1]):
        box, colour = (x - r, y - r, x + r, y + r), tuple(colour)
        if shape == 0:
            pen.ellipse(box, colour)
        elif shape == 1:
            pen.ellipse(box, outline=colour, width=math.ceil(r / 3))
        else:
            turns = [angle + math.pi * corner for corner in corners[shape]]
            pen.polygon([(x + r * math.cos(t), y + r * math.sin(t)) for t in turns], colour)
    return np.asarray(image)


def fractal_bank(seed, n):
    """n iterated function systems of 2 to 4 contractive maps (Anderson and Farrell, WACV 2022).

    A map is rotation x diag(s1, s2) x rotation, 0 < s2 <= s1 < 1 with signs, and a translation.
    Returns maps (n, 4, 7): a row of the matrix and its translation, twice, and s1; and table
    (n, 256): the map that a random byte picks, more often the larger its determinant.
    """
    u = uniforms(seed, BANK, range(n), 32 + 8 * 256)
    count = 2 + (3 * u[:, :1]).astype(int)
    live = np.arange(4) < count
    tries = np.sort(u[:, 32:].reshape(n, 256, 4, 2))[..., ::-1]     # the first try that fits
    total = ((tries[..., 0] + 2 * tries[..., 1]) * live[:, None]).sum(-1)
    fits = (total >= (5 + count) / 2) & (total <= (6 + count) / 2)
    s = tries[np.arange(n), fits.argmax(1)]
    angles, signs, shift = 2 * u[:, 1:25].reshape(3, n, 4, 2) - 1
    cos, sin = np.cos(np.pi * angles), np.sin(np.pi * angles)
    turns = np.stack([cos, -sin, sin, cos], -1).reshape(n, 4, 2, 2, 2)
    first = turns[:, :, 0] * (s * np.sign(signs))[:, :, None]
    matrix = (first[..., None] * turns[:, :, 1, None]).sum(-2)      # `@` may round otherwise
    maps = np.concatenate([matrix, shift[..., None]], -1).reshape(n, 4, 6)
    maps = np.concatenate([maps, s[..., :1]], -1)
    weight = np.maximum(s.prod(-1), 0.03) * live
    edges = 256 * np.cumsum(weight, 1) / weight.sum(1, keepdims=True)
    table = (edges[:, None, :3] <= np.arange(256)[:, None]).sum(-1)
    return torch.from_numpy(maps).float(), torch.from_numpy(table)


def fractal_opacity(maps, table, u, rolls, size, jitter, centre, reach):
    """(B, 1, size, size): logarithm of the density of points that hop by maps drawn at random.

    centre, in shares of the image, and reach, half a side, say where it lies, before jitter. One
    of the maps, the window and the direction change from image to image. Drawn at twice the size.
    """
    maps, b, points = maps.clone(), len(maps), 16 * size
    rows = torch.arange(b)
    which = table[rows, (256 * u[:, 1]).long()]
    grow = 1 - jitter * (0.2 - 0.3 * u[:, 2])                       # U(0.8, 1.1) at jitter 1
    grow = torch.minimum(grow, 0.98 / maps[rows, which, 6])
    maps[rows[:, None], which[:, None], [0, 1, 3, 4, 6]] *= grow[:, None]   # not the translation
    chosen = table.gather(1, torch.cat([rolls & 255, rolls >> 8], 1).long()) + 4 * rows[:, None]
    maps, path = maps.flatten(0, 1)[:, :6].contiguous(), []
    x = y = torch.zeros(b, points)
    for t, hop in enumerate(chosen.view(b, ROUNDS, points).unbind(1)):
        m = F.embedding(hop, maps).unbind(-1)
        x, y = m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]
        if t >= SETTLE:
            path.append(torch.stack([x, y], 1))
    path = torch.cat(path, 2) * torch.where(u[:, 3:5] < 0.5, -1, 1)[:, :, None]      # flips
    low, high = path.amin(2, keepdim=True), path.amax(2, keepdim=True)
    zoom = 2 * reach * (1 + 0.3 * jitter * (u[:, 5:6] - 0.6)) / (high - low).amax(1)
    shift = centre + 0.3 * reach * jitter * (u[:, 6:8] - 0.5)
    path = (path - (low + high) / 2) * zoom[:, None] + shift[:, :, None]
    fine = 2 * size
    at = (path * fine).floor()
    inside = ((at >= 0) & (at < fine)).all(1)
    at = (rows[:, None] * fine + at[:, 1].long()) * fine + at[:, 0].long()
    counts = torch.bincount(at[inside], minlength=b * fine ** 2).view(b, 1, fine, fine)
    tone = F.avg_pool2d(counts.float().log1p(), 2)
    return tone / tone.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)


def smooth_field(noise, slope, stretch=None, angle=None):
    """Gaussian fields with power 1/f^slope and deviation 1: noise (B, 1, S, S), the rest (B,)."""
    size = noise.shape[-1]
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    if angle is not None:
        c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
        stretch = stretch[:, None, None] ** 0.5
        fx, fy = (c * fx + s * fy) * stretch, (c * fy - s * fx) / stretch
    square = (fx ** 2 + fy ** 2).expand(len(noise), -1, -1).clone()
    square[:, 0, 0] = math.inf                  # no mean
    x = torch.fft.rfft2(noise) * (square ** (-slope[:, None, None] / 4))[:, None]
    x = torch.fft.irfft2(x, s=(size, size))
    return x / x.std((2, 3), keepdim=True)


def hsv(hue, saturation, value):
    """(..., 3) red, green and blue, all between 0 and 1."""
    sixth = (6 * hue[..., None] + torch.tensor([0., 4, 2])) % 6
    pure = ((sixth - 3).abs() - 1).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * (1 - pure))


def background(u, noise, contrast):
    """(B, 3, S, S): a smooth field in a faint colour, with a weaker one in another colour."""
    one = torch.ones_like(u[:, 0])
    tint = hsv(u[:, 20], 0.5 * u[:, 21], one)[:, :, None, None]
    other = (hsv(u[:, 22], one, one) - 0.5)[:, :, None, None]
    level, slope = 0.15 + 0.3 * u[:, 23, None, None, None], 2 + u[:, 24]
    contrast = contrast * (0.8 + 0.4 * u[:, 25, None, None, None])
    return tint * (level + contrast * smooth_field(noise[:, :1], slope)) \
        + contrast / 2 * other * smooth_field(noise[:, 1:], slope)


# ---- Images from a network that is trained on a source: a rectified flow (arXiv 2209.03003) -


class ResBlock(nn.Module):
    """Two 3x3 convolutions; the condition scales and shifts what goes from one to the other."""
    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(16, c_in), nn.SiLU(),
                                   nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(16, c_out))
        self.condition = nn.Linear(emb, 2 * c_out)
        self.second = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x, e):
        scale, shift = self.condition(e)[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.second(F.silu(self.first(x) * (1 + scale) + shift))


class UNet(nn.Module):
    """Velocity of the flow: images (B, 3, S, S), time (B,), condition (B, classes + 1)."""
    def __init__(self, num_classes, emb=256, widths=(64, 128, 192, 240)):
        super().__init__()
        self.register_buffer('frequencies', torch.randn(64) * 8)
        self.embed = nn.Sequential(nn.Linear(129 + num_classes, emb), nn.SiLU(),
                                   nn.Linear(emb, emb), nn.SiLU())
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        back = widths[::-1]
        self.down = nn.ModuleList(ResBlock(a, b, emb) for a, b in zip(widths[:1] + widths, widths))
        self.up = nn.ModuleList(ResBlock(a + b, b, emb) for a, b in zip(back[:1] + back, back))
        self.head = nn.Sequential(nn.GroupNorm(16, widths[0]), nn.SiLU(),
                                  nn.Conv2d(widths[0], 3, 3, padding=1))

    def forward(self, x, t, y):
        phase = 2 * math.pi * t[:, None] * self.frequencies
        e = self.embed(torch.cat([phase.cos(), phase.sin(), 8 * y], 1))     # 8: as much as time
        x, kept = self.stem(x), []
        for block in self.down:
            x = block(F.avg_pool2d(x, 2, ceil_mode=True) if kept else x, e)
            kept.append(x)
        for block in self.up:
            x = F.interpolate(x, kept[-1].shape[2:])
            x = block(torch.cat([x, kept.pop()], 1), e)
        return self.head(x)


def conditions(labels, num_classes):
    """float (B, classes + 1) of labels (B,) or (B, classes); the last column stands for "any"."""
    rows = labels if labels.ndim == 2 else F.one_hot(labels, num_classes)
    return F.pad(rows.float(), (0, 1))


def flow_loss(network, x, y):
    """Loss of a flow from noise to images x, a tenth of them without their conditions y."""
    drop = (torch.rand(len(x), 1, device=x.device) < 0.1).float()
    y = torch.cat([y[:, :-1] * (1 - drop), drop], 1)
    t = torch.randn(len(x), device=x.device).sigmoid()
    noise = torch.randn_like(x)
    has_bf16 = x.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=has_bf16):
        velocity = network(torch.lerp(noise, x, t[:, None, None, None]), t, y)
    return (velocity.float() - (x - noise)).square().mean()


def train_flow(source, path, steps, seed, device):
    """Return a UNet with averaged weights; goes on from a checkpoint at `path`, bit for bit."""
    torch.manual_seed(seed)
    network = UNet(len(source.classes)).to(device)
    average = AveragedModel(network, multi_avg_fn=lambda averages, weights, _: torch._foreach_lerp_(
        averages, weights, 1 - min(0.999, step / (step + 10))))
    adam = torch.optim.Adam(network.parameters())
    parts = {'network': network, 'average': average, 'adam': adam}
    # A checkpoint of other data or another seed is refused.
    about = [source.sha256(), hashlib.sha256(source.labels.tobytes()).hexdigest(), source.classes,
             source.image_size, seed]
    step, saved = 0, 0.0
    if path.exists():
        state = load_file(path, 'remove it')
        with readable(f'{path} does not fit', 'Remove it, or choose another --out.'):
            if state['about'] != about or state['step'] > steps:
                raise ValueError('other images, labels or seed, or more steps')
            for name, part in parts.items():
                part.load_state_dict(state[name])
        step = state['step']
    batches = Batches(source, range(len(source)), min(64, len(source)), device, seed=seed)
    progress, text = Progress(steps, 'steps', step, ''), ''
    while step < steps:
        epoch = batches.epoch(*divmod(step, len(batches)))
        for _, (x, y) in zip(range(step, steps), epoch):
            torch.manual_seed((seed * 10 ** 9 + step) % 2 ** 63)
            loss = flow_loss(network, x, conditions(y, len(source.classes)))
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1)
            adam.param_groups[0]['lr'] = 5e-4 * min(1, (step + 1) / 100)
            adam.step()
            adam.zero_grad()
            average.update_parameters(network)
            step += 1
            progress.update(step, text)
            if step % 20 and step < steps:
                continue
            if not loss.isfinite():
                raise UserError(f'{path}: the loss is not finite. Remove it, use another --seed.')
            text = f'loss {loss:.3f}'
            if step == steps or time.time() - saved > 60:
                write_file(path, {'about': about, 'step': step,
                                  **{name: part.state_dict() for name, part in parts.items()}})
                saved = time.time()
    progress.close()
    return average.module.eval()


@torch.no_grad()
def sample_flow(network, x, y, guidance=1.5, steps=30):
    """Images, normalised, of normal noise x and conditions y: Euler steps with guidance."""
    free = torch.zeros_like(y)
    free[:, -1] = 1
    for k in Progress(steps, f'steps for {len(x)} images').over(range(steps)):
        t = torch.full((2 * len(x),), k / steps, device=x.device)
        with_y, without = network(torch.cat([x, x]), t, torch.cat([y, free])).chunk(2)
        x = x + (without + guidance * (with_y - without)) / steps
    return x


def flow_images(s, device):
    """Made: images of a network that is trained on a source, for labels as the source has them."""
    if 'generator_steps' not in s:
        raise UserError('--generator train: use generate_data.py, and give its folder as --data')
    source, n, seed = read(s['source'], s), s['num_images'], s['data_seed']
    size, classes = source.image_size, len(source.classes)
    path = Path(f'{s["out"]}.generator', 'checkpoint.pt')
    path.parent.mkdir(parents=True, exist_ok=True)
    network = train_flow(source, path, s['generator_steps'], seed, device)
    labels = draw_labels(seed, n, classes, 'balanced')
    if source.multilabel:               # vectors of labels that the source has
        labels = (source.labels[draw_labels(seed, n, len(source))] == 1).astype(np.uint8)
    mean, std = torch.tensor([source.mean, source.std], device=device)

    def images(start):
        y = conditions(torch.from_numpy(labels[start:start + 64]), classes)
        z = uniforms(seed, DRAWS, range(start, start + len(y)), 3 * size * size)
        z = torch.special.ndtri(torch.from_numpy(z)).float().view(-1, 3, size, size)
        x = sample_flow(network, z.to(device), y.to(device)).permute(0, 2, 3, 1) * std + mean
        return (x.clamp(0, 1) * 255).round().byte().cpu().numpy()

    return Made(labels, source.classes, map(images, range(0, n, 64)))


FORMULA = 'num_images generator num_classes difficulty fresh'
GENERATORS = {
    'fractal': Kind(formula_images, f'{FORMULA} multilabel'),
    'spectrum': Kind(formula_images, FORMULA),
    'deadleaves': Kind(formula_images, FORMULA),
    'train': Kind(flow_images, 'num_images generator source generator_steps')}
KINDS = {
    'noise': Kind(noise, 'num_images num_classes multilabel label_mode fresh'),
    'random_labels': Kind(random_labels, 'source label_mode label_noise', augment=True),
    # Only `augment` and `settings` are read here: kind_of returns the row of a generator.
    'generated': GENERATORS['fractal']._replace(augment=True)}


# ---- Writing a data set ---------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(out):
    """Yield a hidden folder that takes the name `out` when the block ends well."""
    out = Path(os.path.realpath(out))
    new = out.with_name(f'.{out.name}.new')
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f'.{out.name}.lock'), 'w') as lock:     # the file stays
        fcntl.flock(lock, fcntl.LOCK_EX)            # one process at a time
        if out.exists():
            raise UserError(f'{out} exists. Remove it, or choose another --out.')
        shutil.rmtree(new, ignore_errors=True)      # what a killed run left
        try:
            new.mkdir()
            yield new
            os.replace(new, out)
        except OSError as error:
            error.filename = error.filename or str(out)     # which a full disk does not say
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)


def settings_of_set(name, s):
    """{setting: value} of what a set of this kind depends on; folders as absolute paths."""
    used = settings_of(name, s)
    own = {key: s[key] for key in DATA if key in used - {'data_dir', 'download', 'fresh'}}
    if 'source' in own and own['source'] not in REAL:
        own['source'] = str(Path(own['source']).resolve())
    elif 'source' not in own:
        own['image_size'] = s['image_size'] or 32
    return own


def make_set(out, name, s, device):
    """Write a set into the folder `out`: images.npy (not of a source), labels, meta.json, sheet."""
    own = settings_of_set(name, s)
    with new_folder(out) as folder:
        made = kind_of(name, s).make({**s, 'out': out, 'image_size': own['image_size']}, device)
        labels, source = np.ascontiguousarray(made.labels), made.source
        if source is None:
            images = write_images(folder / 'images.npy', len(labels), made.chunks)
            source = Data(out, name, images, labels, made.classes, *mean_and_std(images),
                          images.shape[1])
        np.save(folder / 'labels.npy', labels)
        sha256 = {'images': source.sha256(), 'labels': hashlib.sha256(labels).hexdigest()}
        meta = {'kind': name, 'seed': s['data_seed'], 'settings': own, 'classes': made.classes,
                'num_images': len(labels), 'image_size': source.image_size, 'mean': source.mean,
                'std': source.std, **made.meta, 'sha256': sha256,
                'command': shlex.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]]),
                'versions': {'numpy': np.__version__, 'torch': torch.__version__}}
        contact_sheet(source, labels, meta).save(folder / 'sheet.png')
        write_file(folder / 'meta.json', json.dumps(meta, indent=1) + '\n')


def write_images(path, n, chunks):
    """Stream n images into an .npy file, and return them mapped."""
    progress, done = Progress(n, 'images'), 0
    with open(path, 'wb') as file:
        for chunk in chunks:
            if not done:
                np.lib.format.write_array_header_1_0(file, {
                    'descr': '|u1', 'fortran_order': False, 'shape': (n, *chunk.shape[1:])})
                if (size := n * chunk[0].nbytes / 1e9) > 1:
                    print(f'{n:,} images of {chunk.shape[1]} px: {size:.1f} GB', file=sys.stderr)
            file.write(chunk.tobytes())
            done += len(chunk)
            progress.update(done)
    progress.close()
    return np.load(path, 'r')


def mean_and_std(images):
    """Two lists by channel, of pixels / 255; no deviation is below 1 / 255."""
    counts, values = np.zeros((3, 256), np.int64), np.arange(256)
    step = math.ceil(2 ** 24 / images[0].size)
    starts = range(0, len(images), step)
    for start in Progress(len(starts), f'x {step} images counted').over(starts):
        for channel, pixels in enumerate(images[start:start + step].reshape(-1, 3).T):
            counts[channel] += np.bincount(pixels, minlength=256)
    mean = counts @ values / counts.sum(1)
    variance = counts @ values ** 2 / counts.sum(1) - mean ** 2
    return (mean / 255).tolist(), (np.sqrt(np.maximum(variance, 1)) / 255).tolist()


def sheet_rows(labels):
    """Up to 100 rows for the sheet: the first of each class, then the first of all.

    They are sorted by class if each image has one label, else by place.
    """
    rows, classes = np.arange(len(labels)), labels
    if labels.ndim == 2:
        rows, classes = np.nonzero(labels == 1)
    first = rows[np.unique(classes, return_index=True)[1]].tolist()
    chosen = np.sort([*dict.fromkeys([*first, *range(min(100, len(labels)))])][:100])
    return chosen if labels.ndim == 2 else chosen[np.argsort(labels[chosen], kind='stable')]


def contact_sheet(data, labels, meta):
    """A labelled PIL image of up to 100 images of a Data, in ten columns."""
    side, step, shown = 72, 90, sheet_rows(labels)
    gap, rows = step - side, math.ceil(len(shown) / 10)
    sheet = Image.new('RGB', (gap + 10 * step, gap + rows * step), 'white')
    pen = ImageDraw.Draw(sheet)
    # A name that is not ASCII, which Pillow's font lacks, is its number.
    names = [name if name.isascii() else str(k) for k, name in enumerate(meta['classes'])]
    kind = meta['settings'].get('generator', meta['kind'])
    pen.text((gap, 2), f'{kind}: {meta["num_images"]:,} images of {meta["image_size"]} px, '
             f'{len(names):,} classes, seed {meta["seed"]}', 'black')
    for place, k in enumerate(shown):
        x, y = gap + place % 10 * step, gap + place // 10 * step
        how = Image.NEAREST if data.image_size < side else Image.BOX
        sheet.paste(Image.fromarray(data.image(k)).resize((side, side), how), (x, y))
        classes = [labels[k]] if labels.ndim == 1 else np.flatnonzero(labels[k] == 1)
        name = ' '.join(names[c] for c in classes)[:40]
        while pen.textlength(name) > step - 4:
            name = name.removesuffix('…')[:-1] + '…'
        pen.text((x, y + side + 2), name, 'dimgray')
    return sheet


# ---- Reading a data set ---------------------------------------------------------------------


@dataclass
class Data:
    """One split of a data set. Images are uint8 arrays (N, H, W, 3), or files read when needed."""
    name: str                   # what the user called it
    kind: str                   # 'real', or one of KINDS
    images: np.ndarray          # or None: they are read from their files
    labels: np.ndarray          # int64 (N,), or (N, classes) of 0, 1, -1 (not known)
    classes: list
    mean: list                  # of pixels / 255, per channel
    std: list
    image_size: int
    studies: np.ndarray = None  # of chest X-rays: 'patient00001/study1' of each image
    files: list = None          # paths, if each image has its own file
    zoom: float = 1.0           # shorter side of a file, divided by the side that is cut out
    on_device: torch.Tensor = None      # the images, put there by Batches
    fresh: int = 0              # after so many epochs the images are drawn anew, by
    draw: object = None         # draw(places) -> uint8 (n, H, W, 3); N places a turn

    @property
    def multilabel(self):
        return self.labels.ndim == 2

    @property
    def small(self):
        return len(self.labels) * self.image_size ** 2 * 3 <= RESIDENT

    def __len__(self):
        return len(self.labels)

    def split(self, rows, fraction, seed):
        """Split rows in two as stratified_split does. Of X-rays it splits the patients."""
        if self.studies is None:
            return [rows[part] for part in stratified_split(self.labels[rows], fraction, seed)]
        patients = [study.split('/')[0] for study in self.studies[rows]]
        names, whose = np.unique(patients, return_inverse=True)
        chosen, _ = stratified_split(np.zeros(len(names), int), fraction, seed)
        in_first = np.isin(whose, chosen)
        return rows[in_first], rows[~in_first]

    def image(self, k, crop=False):
        """uint8 (H, W, 3) of the k-th image; crop: a part of it, drawn by torch's generator."""
        if self.images is None:
            return read_image(self.files[k], self.image_size, self.zoom, crop)
        return resize(Image.fromarray(self.images[k]), self.image_size, 1, crop)

    def __getitem__(self, batch):
        """uint8 (n, H, W, 3), by a worker; batch: (rows, augment, seed, epoch, turn of --fresh).

        What `augment` draws for a row depends on these alone: torch's own generator stays as it is.
        """
        (rows, augment, seed, epoch, turn), data, images = batch, self, []
        if turn:
            drawn = self.draw([turn * len(self) + row for row in rows])
            data = replace(self, images=dict(zip(rows, drawn)))
        with torch.random.fork_rng(devices=[]):
            for row in rows:
                sequence = np.random.SeedSequence([seed, epoch, row])
                torch.default_generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
                image = Image.fromarray(data.image(row, augment in ('crop', 'imagenet')))
                for transform in transforms_of(augment):
                    image = transform(image)
                images.append(np.asarray(image))
        batch = torch.from_numpy(np.stack(images))
        if torch.utils.data.get_worker_info():      # torch, which shares it later, would hang
            with readable('/dev/shm is full', 'Take fewer --workers, or a smaller --batch_size.'):
                batch.share_memory_()
        return batch

    def sha256(self):
        """Digest of the images, or of the names and sizes of files that are not in memory."""
        content = self.images
        if content is None:
            names = [f'{path.parent.name}/{path.name} {path.stat().st_size}' for path in self.files]
            content = os.fsencode('\n'.join(names))
        return hashlib.sha256(content).hexdigest()


def read(name, s, split='train'):
    """Data of one split, 'train' or 'test', or None: `name` is one of REAL or a folder's path.

    s: some settings of DATA; the others have their defaults. Real images are resized to image_size;
    a written set never is.
    """
    s = {**DEFAULTS, **s}
    if name in REAL:
        return REAL[name](name, s, split)
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f'{name}: no folder, nor {", ".join([*REAL, *KINDS])}. Check the path.')
    if not (folder / 'meta.json').exists():
        return read_folder(folder, split, s)
    return read_written(folder, s) if split == 'train' else None    # unreal data have no test


def read_written(folder, s):
    """A set of make_set."""
    with readable(f'{folder}: meta.json, labels.npy or images.npy is damaged', 'Make it again.'):
        meta = json.loads((folder / 'meta.json').read_text())
        data = Data(str(folder), meta['kind'], None, np.load(folder / 'labels.npy'),
                    meta['classes'], meta['mean'], meta['std'], meta['image_size'])
        if s['image_size'] not in (None, data.image_size):
            raise UserError(f'{folder}: give --image_size {data.image_size}, or make other images.')
        if hashlib.sha256(data.labels).hexdigest() != meta['sha256']['labels']:
            raise ValueError('other labels')
        own = {**DEFAULTS, **meta['settings'], 'image_size': data.image_size}
        if s['fresh']:
            kind = kind_of(data.kind, own)
            if 'fresh' not in kind.settings.split():
                raise UserError(f'{folder}: --fresh cannot draw such images. Leave it out.')
            data.fresh, data.draw = s['fresh'], kind.make(own, None).draw
        if 'source' not in meta:
            data.images = np.load(folder / 'images.npy', 'r')
            if data.small and data.sha256() != meta['sha256']['images']:
                raise ValueError('other images')
            return data
    own |= {'data_dir': s['data_dir'], 'download': s['download']}
    made = kind_of(data.kind, own).make(own, None)
    source = made.source
    if source.sha256() != meta['sha256']['images'] or not np.array_equal(made.labels, data.labels):
        raise UserError(f'{folder} was made of other images or labels of {own["source"]}. Bring '
                        'those back (see --data_dir), or remove the set and make it again.')
    return replace(data, images=source.images, studies=source.studies, files=source.files,
                   zoom=source.zoom)


# CIFAR: folder, means and standard deviations of the training images (those that DARTS's code
# uses; for CIFAR-100 those of its own images).
CIFAR = {
    'cifar10': ('cifar-10-batches-py', [0.49139968, 0.48215827, 0.44653124],
                [0.24703233, 0.24348505, 0.26158768]),
    'cifar100': ('cifar-100-python', [0.50707516, 0.48654887, 0.44091784],
                 [0.26733429, 0.25643846, 0.27615047])}


class ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and nothing else, because a pickle from elsewhere could run any code."""
    def find_class(self, module, name):
        if module.split('.')[0] in ('numpy', '_codecs') and name in (
                '_reconstruct', 'ndarray', 'dtype', 'encode'):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'it calls {module}.{name}')


def read_arrays(path, *keys):
    """What a file of CIFAR's, which Python 2 wrote, has under each key."""
    with readable(f'{path} is not CIFAR', 'Give its --data_dir, or --download.'), \
            open(path, 'rb') as file:
        content = ArrayUnpickler(file, encoding='latin1').load()
        return [content[key] for key in keys]


def read_cifar(name, s, split):
    """CIFAR-10 or -100 in the layout of its python archive, in data_dir or data_dir itself."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity
    official, folder = getattr(datasets, name.upper()), Path(s['data_dir'])
    inner, mean, std = CIFAR[name]
    if folder.name != inner:
        folder /= inner
    if s['download']:                       # torchvision fetches what is not whole
        folder.parent.mkdir(parents=True, exist_ok=True)
        with readable(f'{name}: no download', f'Put {inner}/ into {folder.parent}.'), \
                open(folder.parent / '.download.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)    # one process fetches, the others wait
            official(folder.parent, download=True)
    files = official.train_list if split == 'train' else official.test_list
    key = 'labels' if name == 'cifar10' else 'fine_labels'
    content = [read_arrays(folder / file, 'data', key) for file, md5 in files]
    unusual = [file for file, md5 in files if not check_integrity(folder / file, md5)]
    if unusual:
        print(f'warning: {folder}: used, but the checksums of {", ".join(unusual)} are not the '
              'official ones. --download replaces such files.', file=sys.stderr)
    pixels, labels = map(np.concatenate, zip(*content))
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    classes, = read_arrays(folder / official.meta['filename'], official.meta['key'])
    size = s['image_size'] or 32
    if size != 32:
        progress = Progress(len(images), 'images resized').over(images)
        images = np.stack([resize(Image.fromarray(x), size) for x in progress])
    return Data(name, 'real', images, labels, classes, mean, std, size)


def read_imagenet(name, s, split):
    """ImageNet as train/<synset>/ and val/<synset>/ in data_dir, or in its folder imagenet/."""
    root = Path(s['data_dir'])
    if not (root / 'train').is_dir():
        root /= name
    listed = list_images(root / ('train' if split == 'train' else 'val'))
    if split == 'test' and (root / 'train').is_dir():
        check_classes(class_folders(root / 'train'), listed[0], root / 'val')
    return data_of_files(name, split, *listed, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225],
                       s['image_size'] or 224)


def read_chexpert(name, s, split, table=None):
    """Chest X-rays in CheXpert's layout (arXiv 1901.07031): train.csv, or valid.csv for 'test'.

    None if valid.csv is missing. table: another CSV, that of the test set, with a column Study,
    which stands for all views of a study. In a test what is uncertain is left out. Mean 0.5 and
    deviation 0.25 are our own choice.
    """
    data_dir = Path(s['data_dir'])
    places = [data_dir, data_dir / 'CheXpert-v1.0-small', data_dir / 'CheXpert-v1.0']
    root = next((place for place in places if (place / 'train.csv').is_file()), data_dir)
    path = Path(table or root / ('train.csv' if split == 'train' else 'valid.csv'))
    if split == 'test' and not table and not path.exists():
        if is_first():
            print(f'warning: {path} is missing, so there is no test. See evaluate.py '
                  '--test_labels.', file=sys.stderr)
        return None
    if not path.is_file():
        raise UserError(f'{table} is no file. Check --test_labels.' if table else
                        f'{data_dir}: no train.csv in it, nor in a CheXpert-v1.0-small/ or '
                        'CheXpert-v1.0/ there. Check --data_dir.')
    paths, labels = read_chexpert_table(path, s['uncertain'] if split == 'train' else 'ignore')
    training, tops = root / 'train.csv', [path.parent, path.parent.parent, root, root.parent]
    root = next((top for top in tops if (top / paths[0]).exists()), root)
    files, rows = [], []
    for row, inside in enumerate(paths):
        file = root / inside
        views = [file] if file.suffix else sorted(file.glob('view*'))
        if not views:
            raise UserError(f'{path}: {file} has no views. Bring it back.')
        for view in views:
            if s['views'] == 'all' or 'frontal' in view.name:
                files.append(view)
                rows.append(row)
    if not files:
        raise UserError(f'{path}: no {s["views"]} view in it. Use --views all.')
    studies = np.array(['/'.join(file.parts[-3:-1]) for file in files])
    if split == 'test' and training.is_file() and is_first():
        trained, _ = read_chexpert_table(training, 'ignore')
        both = {study.split('/')[0] for study in studies} & set('/'.join(trained).split('/'))
        if both:
            print(f'warning: {path}: {len(both)} of its patients are in train.csv too, e.g. '
                  f'{min(both)}: results of networks that were trained on them are too good',
                  file=sys.stderr)
    return data_of_files(name, split, list(CHEXPERT), files, labels[rows], [0.5] * 3, [0.25] * 3,
                         s['image_size'] or 320, studies)


def read_chexpert_table(path, uncertain):
    """(paths, int8 labels (N, 14)) of a CSV; a path begins at train/, valid/ or test/.

    uncertain: what -1.0 becomes; ignore: -1, which losses and metrics leave out. Blank cells are
    zeros.
    """
    rows = {}
    mend = "It needs CheXpert's 14 labels, 1.0, 0.0, -1.0 or blank, and Path (or Study), as " \
        'patientX/studyY/view1_frontal.jpg.'
    with readable(f'{path} is no CSV file of CheXpert', mend), \
            open(path, newline='', encoding='utf-8-sig') as file:
        reader = csv.DictReader(file, restval='no cell')
        names = reader.fieldnames or []
        key = 'Study' if 'Study' in names else 'Path'
        missing = [name for name in (key, *CHEXPERT) if name not in names]
        if missing:
            raise ValueError(f'no column {missing[0]}')
        for row in reader:
            inside, where = re.sub('^.*/(?=(train|valid|test)/)', '', row[key]), reader.line_num
            if inside in rows:
                raise ValueError(f'line {where}: {inside} has a row already')
            if not re.search('patient[^/]*/study[^/]*(/[^/]*)?$', inside):
                raise ValueError(f'line {where}: the path is {inside}')
            for name in CHEXPERT:
                if row[name] not in ('', '0', '0.0', '1', '1.0', '-1', '-1.0'):
                    raise ValueError(f'line {where}: {name} is {row[name]}')
            rows[inside] = [float(row[name] or 0) for name in CHEXPERT]
        if not rows:
            raise ValueError('no rows')
    labels = np.array([*rows.values()])
    unknown = labels == -1
    labels[unknown] = {'ones': 1, 'ignore': -1}.get(uncertain, 0)
    if uncertain == 'mixed':
        labels[unknown & np.isin(list(CHEXPERT), ['Atelectasis', 'Edema'])] = 1
    return list(rows), labels.astype(np.int8)


REAL = dict(cifar10=read_cifar, cifar100=read_cifar, imagenet=read_imagenet, chexpert=read_chexpert)


def read_folder(root, split, s):
    """Pictures, a folder for each class, in root or its splits: see trees_of.

    Without a test split about test_fraction of the pictures are it. A hash of a file's bytes
    decides: copies have one side, and a picture keeps its side if others come or go. With
    skip_broken pictures that cannot be read are left out; else they are named, all at once.
    """
    trees = trees_of(root)
    classes, files, labels = zip(*map(list_images, trees))
    if all(re.fullmatch(r'patient\d+', name) for name in classes[0]):
        raise UserError(f'{root}: its folders are of patients, not of classes. Use --data chexpert '
                        'and the folder of train.csv as --data_dir.')
    check_classes(classes[0], classes[-1], trees[-1])
    is_test = np.arange(sum(map(len, files))) >= len(files[0])      # those of the second tree
    files, labels, classes = np.concatenate(files), np.concatenate(labels), classes[0]
    # Reading 'train', which comes first, tries the pictures of both splits.
    if s['skip_broken'] or (split == 'train' and len(files) <= 20000):
        faults = np.array(try_pictures(files, trees if split == 'train' else []), object)
        fine = faults == ''
        broken = files[~fine]
        if len(broken) and not s['skip_broken']:
            raise UserError(f'{faults[~fine][0]} Pictures that cannot be read: {len(broken)}, '
                            f'{", ".join(map(str, broken[:10]))}. --skip_broken leaves them out.')
        if len(broken) and split == 'train':
            print(f'{root}: broken pictures left out: {len(broken)}', file=sys.stderr)
        files, labels, is_test = files[fine], labels[fine], is_test[fine]
    if len(trees) == 1 and s['test_fraction']:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            hashes = pool.map(lambda file: hashlib.sha256(file.read_bytes()).digest()[:4], files)
            shares = b''.join(Progress(len(files), 'pictures hashed').over(hashes))
        is_test = np.frombuffer(shares, '>u4') / 2.0 ** 32 < s['test_fraction']
    if split == 'train':
        empty = {*range(len(classes))} - {*labels[~is_test]}
        if empty:
            raise UserError(f'{root}: {classes[min(empty)]} has no pictures to train on. Add '
                            'some, or remove its folder.')
        if is_first():
            where = f', from {trees[1].name}/' if len(trees) > 1 else ''
            more = ', ...' if len(classes) > 9 else ''
            counts = np.bincount(labels[is_test], minlength=len(classes))
            sizes = f'{counts.sum()}, {counts.min()} to {counts.max()} a class{where}'
            print(f'{root}: {len(files)} pictures of {len(classes)} classes '
                  f'({", ".join(classes[:9])}{more}); the test has '
                  f'{sizes if counts.any() else "none"}', file=sys.stderr)
    elif not is_test.any():
        return None
    size, mine = s['image_size'] or 32, is_test == (split == 'test')
    # Both splits are normalised by the training pictures, if they are still there.
    shown = files[mine] if is_test.all() else files[~is_test]
    mean, std = mean_and_std(decode(shown[evenly(len(shown), 2000)], size))
    return data_of_files(str(root), split, classes, files[mine], labels[mine], mean, std, size)


def trees_of(root):
    """[root], or its folder train (or training) and, if it has one, val (or test, or the like)."""
    there = {name.lower(): root / name for name in class_folders(root)}
    train = [there[name] for name in ('train', 'training') if name in there]
    tests = ('val', 'valid', 'validation', 'test', 'testing')
    tests = [there[name] for name in tests if name in there]
    has_others = len(there) > len(train) + len(tests)
    # A folder `train` beside other classes, without folders in it, is itself a class.
    if not train or has_others and not class_folders(train[0]):
        return [root]
    return [*train[:1], *tests[:1]]


def evenly(n, most):
    """Up to `most` of n rows, evenly spaced."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)


def data_of_files(name, split, classes, files, labels, mean, std, size, studies=None):
    """A Data of image files. Small sets are decoded at once.

    Above 64 px images, but not X-rays, are resized to 8/7 of the size and their middle is cut out,
    as 256 and 224 px of ImageNet.
    """
    data = Data(name, 'real', None, labels, classes, mean, std, size, studies, list(files),
                8 / 7 if size > 64 and studies is None else 1)
    # For crops the whole image is needed.
    if data.small and len(files) <= AT_ONCE and (data.zoom == 1 or split == 'test'):
        data.images = decode(files, size, data.zoom)
    return data


def class_folders(folder):
    """Names of the folders in a folder, without hidden ones."""
    return sorted(path.name for path in folder.iterdir()
                  if path.is_dir() and not path.name.startswith('.'))


def check_classes(train, test, folder):
    """UserError if the test split, in `folder`, has other classes than the training split."""
    differ = sorted({*train} ^ {*test})
    if differ:
        raise UserError(f'{folder} and the training images differ in their classes: '
                        f'{", ".join(differ[:5])}. Give both the same folders.')


def list_images(folder):
    """(classes, array of paths, int64 labels) of a tree with a folder of images for each class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
    with readable(f'{folder} is no folder of images',
                  'Give each class its own, or another path (of ImageNet: --data_dir).'):
        classes = class_folders(folder)
        if len(classes) < 2:
            raise ValueError(f'folders in it: {", ".join(classes) or "none"}')
        numbers = {name: k for k, name in enumerate(classes)}
        pairs = make_dataset(folder, numbers, IMG_EXTENSIONS, allow_empty=True)
        empty = {*numbers.values()} - {label for _, label in pairs}
        if empty:
            raise UserError(f'{folder / classes[min(empty)]}: no JPEG, PNG, BMP, WebP, TIFF or '
                            'PPM in it. Add some, or remove the class.')
        files, labels = zip(*pairs)
    return classes, np.array([Path(file) for file in files]), np.array(labels)


def try_pictures(files, folders):
    """[why the file cannot be read, or ''] of each. Prints which other files the folders hold."""
    def fault_of(file):
        try:
            read_image(file, 8)
        except UserError as error:
            return str(error)
        return ''

    for folder in folders:
        others = {path for path in folder.rglob('*') if path.is_file()}.difference(files)
        if others:
            print(f'{folder}: files left out: {len(others)}, e.g. {min(others).name}: no JPEG, '
                  'PNG, BMP, WebP, TIFF or PPM, or in no folder of a class', file=sys.stderr)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(Progress(len(files), 'pictures tried').over(pool.map(fault_of, files)))


def decode(files, image_size, zoom=1):
    """All files as uint8 (N, H, W, 3), several at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(lambda file: read_image(file, image_size, zoom), files)
        shape = np.dtype((np.uint8, (image_size, image_size, 3)))
        return np.fromiter(Progress(len(files), 'images read').over(images), shape, len(files))


def read_image(path, image_size, zoom=1, crop=False):
    """uint8 (image_size, image_size, 3) of an image file: see resize. Grey becomes RGB."""
    with readable(f'{path}: not a readable image', 'Mend it, or take it out of the data.'), \
            Image.open(path, formats=['JPEG', 'PNG', 'BMP', 'WEBP', 'TIFF', 'PPM']) as image:
        return resize(image, image_size, zoom, crop)


def resize(image, size, zoom=1, crop=False):
    """uint8 (size, size, 3): the middle of a PIL image whose shorter side becomes size * zoom.

    crop: instead RandomResizedCrop (arXiv 1409.4842), drawn by torch's generator.
    """
    if image.mode == 'F':
        raise ValueError('its pixels are fractions: save it with 8 or 16 bits')
    with contextlib.suppress(Exception):            # the next call gives an empty one
        image.getexif()
    # It may say that a picture lies on its side. Of a TIFF Pillow gives the turned size already.
    turned = image.format != 'TIFF' and image.getexif().get(274) in (5, 6, 7, 8)
    w, h = image.size[::-1] if turned else image.size
    if crop:
        from torchvision.transforms import RandomResizedCrop
        top, left, high, wide = RandomResizedCrop.get_params(
            torch.empty(1, h, w, device='meta'), (0.08, 1), (3 / 4, 4 / 3))
        how, shares = Image.BILINEAR, (left / w, top / h, (left + wide) / w, (top + high) / h)
        part = min(high, wide) / min(w, h)
    else:                                           # whole pixels, as if first resized, then cut
        scale, part = round(size * zoom) / min(w, h), 1 / zoom
        how = Image.BILINEAR if zoom > 1 else Image.BICUBIC         # the first as for ImageNet
        wide, high = max(size, round(w * scale)), max(size, round(h * scale))
        left, top = (wide - size) // 2, (high - size) // 2
        shares = left / wide, top / high, (left + size) / wide, (top + size) / high
    # A JPEG is decoded at a half, a quarter or an eighth if that leaves enough.
    image.draft('RGB', [math.ceil(2 * size / part * side / min(w, h)) for side in image.size])
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):                  # 16 bits, which Pillow would clip at 255
        pixels = np.asarray(image)
        if 0 < pixels.max() < 4096:                 # 12 bits, as of a scanner, would be black
            raise ValueError('no pixel is above 4095 of 65535: multiply by 16, or save 8 bits')
        image = Image.fromarray(np.uint8(np.rint(pixels.clip(0, 65535) / 257)))
    if image.has_transparency_data:                 # what lies below may be all black
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    box = [share * side for share, side in zip(shares, 2 * image.size)]
    return np.asarray(image.convert('RGB').resize((size, size), how, box))


# ---- From a data set to batches -------------------------------------------------------------


def find_or_make(name, s):
    """The training split of --data; an unreal set that is missing is made first, under data/.

    Of several processes that need it, one makes it and the others wait.
    """
    if name not in KINDS:
        return read(name, s)
    own = settings_of_set(name, s)
    unnamed = {**DEFAULTS, 'image_size': None if 'source' in own else 32}
    parts = [f'{key}={Path(str(value)).name}' for key, value in own.items()
             if value != unnamed[key] and key != 'data_seed']
    folder = Path('data', '-'.join([name, *parts, f'seed{own["data_seed"]}']))
    if not folder.exists():
        if is_first():
            print(f'making {folder}', file=sys.stderr)
        try:
            make_set(folder, name, s, torch.device('cpu'))
        except (UserError, OSError):
            if not folder.exists():             # else another process has just made it
                raise
    data = read(str(folder), s)
    made = json.loads((folder / 'meta.json').read_text())['settings']
    # The name has only the last part of a path, so two sources may share it.
    differ = [key for key in own if made.get(key) != own[key]]
    if differ:
        raise UserError(f'{folder} was made with another {differ[0]}. Rename or remove it.')
    return data


def stratified_split(labels, fraction, seed):
    """Two sorted index arrays, drawn by seed: ceil(n * fraction) of each class, and the rest.

    Images with several labels are one class.
    """
    rng = np.random.Generator(np.random.Philox([seed, len(labels)]))
    groups = labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)
    order = np.lexsort((rng.random(len(labels)), groups))
    grouped = groups[order]
    rank = np.arange(len(labels)) - np.searchsorted(grouped, grouped)   # within the class
    # In each class those come first at whose rank ceil(rank * fraction) grows. (0.025 * 5000 is a
    # little more than 125 in floating point.)
    first = np.ceil((rank + 1) * fraction - 1e-8) > np.ceil(rank * fraction - 1e-8)
    return np.sort(order[first]), np.sort(order[~first])


IN_WORKERS = ('crop', 'imagenet', 'affine')     # done by the processes that read images
AUGMENTATIONS = ['none', 'standard', *IN_WORKERS]


def transforms_of(augment):
    """What workers do to an image that is cropped; the X-rays' slight moves are our own choice."""
    if augment not in IN_WORKERS:
        return []
    from torchvision.transforms import v2
    if augment == 'affine':
        return [v2.RandomAffine(5, (0.05, 0.05), (0.95, 1.05),
                                interpolation=v2.InterpolationMode.BILINEAR)]
    colours = [v2.ColorJitter(0.4, 0.4, 0.4, 0.2)] if augment == 'imagenet' else []
    return [v2.RandomHorizontalFlip(), *colours]


def auto_augment(data):
    """The augmentation that --augment auto means for a Data."""
    if data.kind in KINDS and not KINDS[data.kind].augment:
        return 'none'
    if data.multilabel:
        return 'affine'
    return 'imagenet' if data.image_size > 64 else 'standard'


class Batches:
    """Normalised batches of some images of a Data, every epoch in an order of its own.

    Yields x (B, 3, H, W) float32, channels_last, and y, int64 (B,) or float32 (B, classes). Draws
    depend on (seed, epoch), in workers on the image too: an epoch can be entered at any step. Each
    process gets its share of every batch. augment: 'standard' is RandomCrop (padding 4 at 32 px)
    and flip; 'crop' RandomResizedCrop and flip; 'imagenet' that and colours; 'affine' a slight
    turn, shift and zoom. cutout: side of a square that is blanked (arXiv 1708.04552). The last
    incomplete batch is dropped; with shuffle=False every image comes once, in order.
    """
    def __init__(self, data, indices, batch_size, device, augment='none', cutout=0, seed=0,
                 shuffle=True, workers=2):
        rank, processes = world()
        if len(indices) < batch_size and shuffle:
            raise UserError(f'--batch_size {batch_size} is more than the {len(indices)} images of '
                            f'its split of {data.name} (--train_portion). Use a smaller one, or '
                            '--preset laptop.')
        self.data, self.indices, self.batch_size = data, np.asarray(indices), batch_size
        # In training a process gets a slice of every batch, in a test every so-many-th image.
        self.part = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)
        if not shuffle:
            self.part, self.indices = slice(0, batch_size), self.indices[rank::processes]
        self.augment = auto_augment(data) if augment == 'auto' else augment
        self.device, self.cutout, self.seed = device, cutout, seed
        self.shuffle, self.workers = shuffle, workers
        self.mean = torch.tensor(data.mean, device=device) * 255
        self.scale = 1 / (torch.tensor(data.std, device=device) * 255)
        labels = torch.from_numpy(np.ascontiguousarray(data.labels))
        self.labels = (labels.float() if data.multilabel else labels).to(device)
        transforms_of(self.augment)             # so that the workers find torchvision loaded
        self.images = None                      # on the device, if the set is small
        if data.small and data.images is not None and self.augment not in IN_WORKERS:
            if data.on_device is None:
                data.on_device = torch.from_numpy(np.array(data.images)).to(device)
            self.images = data.on_device.clone() if data.fresh else data.on_device
        self.turns = np.zeros(len(data), int)   # of --fresh: in which each image was drawn

    def __len__(self):
        n = len(self.indices)
        return n // self.batch_size if self.shuffle else -(-n // self.batch_size)

    def epoch(self, epoch=0, start=0, again=0):
        """Yield batches start, start + 1, ... of an epoch; another `again` is another order."""
        rng = np.random.Generator(np.random.Philox([self.seed, epoch + again]))
        n, step = len(self.indices), self.batch_size
        indices = self.indices[rng.permutation(n)] if self.shuffle else self.indices
        draws = torch.from_numpy(rng.random((n, 11), np.float32)).to(self.device)
        order = torch.from_numpy(indices).to(self.device)
        parts = [slice(k * step + self.part.start, k * step + self.part.stop)
                 for k in range(start, len(self))]
        turn = epoch // self.data.fresh if self.data.fresh else 0
        to_load = [indices[part] for part in parts]
        if self.images is not None:             # load only what --fresh draws anew
            to_load = [rows[self.turns[rows] != turn] for rows in to_load]
        loaded = self.load(to_load, epoch + again, turn)
        for part, rows in zip(parts, to_load):
            if len(rows):
                x = next(loaded).to(self.device, non_blocking=True)
            if self.images is not None:
                if len(rows):
                    self.images[torch.from_numpy(rows)] = x
                    self.turns[rows] = turn
                x = self.images[order[part]]
            yield self.prepare(x, draws[part]), self.labels[order[part]]

    def load(self, batches, epoch, turn):
        """Yield uint8 (B, S, S, 3) of each array of rows that is not empty, from the workers."""
        items = [(rows.tolist(), self.augment, self.seed, epoch, turn)
                 for rows in batches if len(rows)]
        loader = torch.utils.data.DataLoader(
            self.data, batch_size=None, sampler=items, num_workers=self.workers,
            multiprocessing_context='fork' if self.workers else None,       # shares the images
            worker_init_fn=die_with_parent,
            pin_memory=self.device.type == 'cuda', generator=torch.Generator())
        # Workers start with signals blocked: one sent to all must not end them before the save.
        atexit.unregister(kill_workers)
        atexit.register(kill_workers)
        signals = signal.SIGINT, signal.SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            loaded = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        try:
            yield from loaded
        except UserError as error:              # a worker's traceback stands before its message
            raise UserError(str(error).split('UserError: ')[-1].strip()) from None

    def prepare(self, x, u):
        """Return (B, 3, S, S), normalised and augmented, of uint8 (B, S, S, 3).

        u (B, 11), from 0 to 1: column 0 decides the flip, 1 and 2 place the cutout, 3 and 4 the
        shift. The others are not used; without them each later image would get other numbers.
        """
        size = self.data.image_size
        at = torch.arange(size, device=x.device)
        if self.augment == 'standard':
            padding, images = size // 8, torch.arange(len(x), device=x.device)
            shift = (u[:, 3:5] * (2 * padding + 1)).long()
            rows = shift[:, :1] + at
            columns = shift[:, 1:] + torch.where(u[:, :1] < 0.5, size - 1 - at, at)
            x = F.pad(x, (0, 0, padding, padding, padding, padding))
            x = x[images[:, None, None], rows[:, :, None], columns[:, None]]
        x = ((x.float() - self.mean) * self.scale).permute(0, 3, 1, 2)
        if self.cutout:
            start = (u[:, 1:3, None] * size).long() - self.cutout // 2
            rows, columns = ((at >= start) & (at < start + self.cutout)).unbind(1)
            x = x * (~(rows[:, None, :, None] & columns[:, None, None])).float()
        return x


def die_with_parent(_worker):
    """End this worker with its run, whose GPU memory it would hold."""
    with contextlib.suppress(AttributeError):       # another system than Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def kill_workers():
    """End the workers that are left at the end of a script, which block Python's SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch would call it an error
    for worker in multiprocessing.active_children():
        worker.kill()


@one_line_errors
def main(argv=None):
    own = {'kind': Setting(None, 'what to make', list(KINDS)),
           'out': Setting(None, 'folder to write', name_or_path),
           'seed': Setting(0, 'of pixels and labels', number(int, 0)),
           'generator_steps': Setting(50000, 'of training, for --generator train', number(int, 1)),
           'gpu': Setting(-1, 'CUDA device for --generator train', number(int, -1))}
    data = {name: DATA[name] for name in DATA if name not in ('data_seed', 'fresh')}
    s, typed, _ = parse_flags(__doc__, {'set': own, 'data': data}, argv)
    kind, out = s['kind'], s['out']
    if not kind or not out:
        raise UserError('Give --kind and --out (see --help).')
    if out in (*KINDS, *REAL):                  # which --data would take for something else
        raise UserError(f'--out {out} names a kind of data. Use --out data/{out}, for example.')
    used = settings_of(kind, s)
    unused = {*DATA, 'generator_steps'} - used
    if 'source' not in used:
        unused |= {'data_dir', 'download'}
    what = kind + (f' --generator {s["generator"]}' if kind == 'generated' else '')
    refuse_idle(typed, unused, f'for --kind {what}')
    both = [os.path.realpath(out), os.path.realpath(s['source'])]
    if s['source'] not in REAL and os.path.commonpath(both) in both:
        raise UserError(f'--out {out}: it or --source lies in the other. Write elsewhere.')
    make_set(out, kind, {**s, 'data_seed': s['seed']}, choose_device(s['gpu']))
    print(f'wrote {out}: look at {Path(out, "sheet.png")}')
    laptop = [] if torch.cuda.is_available() else ['--preset', 'laptop']
    script = os.path.relpath(Path(__file__).with_name('search.py'))
    print('next:', shlex.join(['python', script, '--data', out, *laptop]))


if __name__ == '__main__':
    leave(main())
