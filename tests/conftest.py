"""Fixtures and helpers: each test runs in an empty folder of its own, at tiny size, on the CPU."""
import csv
import io
import json
import os
import pickle
import re
import signal
import struct
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

os.environ.setdefault('OMP_NUM_THREADS', '1')       # a second one only waits for such small maps

import generate_data  # noqa: E402
import search  # noqa: E402
import textbook  # noqa: E402
import torch  # noqa: E402

CPU = torch.device('cpu')
SIZES = ['--layers', '3', '--init_channels', '4', '--batch_size', '8', '--epochs', '2',
         '--steps_per_epoch', '2', '--gpu', '-1']
NOISE = ['--data', 'noise', '--num_images', '64', '--image_size', '8']
CELLS = ['--cells_per_stage', '1', '--space', 'nb201']
TINY = [*NOISE, *SIZES[2:], *CELLS]                 # the cheaper space
DARTS = [*NOISE, *SIZES, '--space', 'darts']
ONESHOT = [*TINY, '--method', 'oneshot', '--candidates', '12']
UNTRAINED = [*NOISE, '--init_channels', '4', '--batch_size', '8', '--candidates', '6',
             '--gpu', '-1', *CELLS]                     # of naswot, say
RETRAIN = ['--arch', 'DARTS_V2', *NOISE, *SIZES]
ONE_STEP = ['--epochs', '1', '--steps_per_epoch', '1']


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_set(out, *flags, kind='noise'):
    """Make a small set by the flags of generate_data.py, and read it."""
    small = ['--num_images', '40', '--num_classes', '4', '--image_size', '8']
    flags = [*(small if kind != 'random_labels' else []), *flags]
    assert generate_data.main(['--kind', kind, '--out', out, '--gpu', '-1', *flags]) == 0
    return generate_data.read(out, {})


class Python2(pickle._Pickler):
    """Writes byte strings and arrays as Python 2 and an old numpy wrote them."""
    dispatch = {**pickle._Pickler.dispatch,
                str: lambda self, text: self.write(b'T' + struct.pack('<i', len(text))
                                                   + text.encode('latin1')),
                bytes: lambda self, text: self.save(text.decode('latin1'))}


def python2_pickle(content):
    file = io.BytesIO()
    Python2(file, 2).dump(content)
    return file.getvalue().replace(b'numpy._core', b'numpy.core')


def fake_cifar(root='data', n=20, first=0):
    """CIFAR-10's layout with n images a file, whose labels count from `first`."""
    folder = Path(root, 'cifar-10-batches-py')
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for file in [f'data_batch_{k}' for k in range(1, 6)] + ['test_batch']:
        content = {'data': rng.integers(0, 256, (n, 3072), np.uint8),
                   'labels': [(first + k) % 10 for k in range(n)]}
        (folder / file).write_bytes(python2_pickle(content))
    (folder / 'batches.meta').write_bytes(python2_pickle({'label_names': list('abcdefghij')}))
    return folder


def folder_of_images(root, classes=('cat', 'dog'), n=4, size=(20, 16), ending='png'):
    """A folder of n smooth pictures for each class; size: width, height."""
    rng = np.random.default_rng(0)
    for name in classes:
        Path(root, name).mkdir(parents=True)
        for k in range(n):
            pixels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
            Image.fromarray(pixels).resize(size).save(Path(root, name, f'{k}.{ending}'))


def imagenet(root):
    """ImageNet's layout: three classes of 8 and 2 images."""
    for split, n in (('train', 8), ('val', 2)):
        folder_of_images(Path(root, split), ('n01', 'n02', 'n03'), n, (80, 72), 'JPEG')


COLUMNS = ['Path', 'Sex', 'Age', 'Frontal/Lateral', 'AP/PA', *generate_data.CHEXPERT]


def write_rows(path, rows, columns=COLUMNS):
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path):
    return list(csv.DictReader(Path(path).read_text().splitlines(True)))


def chexpert(root, layout='CheXpert-v1.0-small', prefix=None, patients=12, columns=COLUMNS):
    """Patients with a frontal and a lateral view; a label is blank, 1, 0 or, in training, -1."""
    rng, splits = np.random.default_rng(0), {'train': [], 'valid': []}
    for p in range(patients + 6):
        split = 'train' if p < patients else 'valid'
        study = f'patient{p:05d}/study1'
        folder = Path(root, layout, split, study)
        folder.mkdir(parents=True)
        cells = {name: ['', '1.0', '0.0', '-1.0' if split == 'train' else '1.0'][(p + k) % 4]
                 for k, name in enumerate(generate_data.CHEXPERT)}
        cells['Fracture'] = ''
        for view in ('view1_frontal', 'view2_lateral'):
            pixels = rng.integers(0, 256, (6, 5), np.uint8)
            Image.fromarray(pixels).resize((20, 24)).save(folder / f'{view}.jpg')
            splits[split].append({
                'Path': f'{prefix or layout}/{split}/{study}/{view}.jpg', 'Sex': 'Male', 'Age': 5,
                'Frontal/Lateral': view[6:].title(), 'AP/PA': 'PA', **cells})
    for split, rows in splits.items():
        write_rows(Path(root, layout, f'{split}.csv'), rows, columns)


def batch(size=8, n=6):
    return torch.randn(n, 3, size, size), torch.randint(4, (n,))


def searching(*flags):
    """(method, its network) for four classes, whose alphas are far from uniform."""
    length = ['--cells_per_stage', '1'] if 'nb201' in flags else ['--layers', '3']
    args = search.parse(['--init_channels', '4', *length, *flags])
    method = search.METHODS[args.method](args, 4, 'cifar', CPU)
    network = method.build()
    for alpha in network.alphas.values():
        alpha.data.mul_(500)
    return method, network


def with_textbook(*flags):
    """(method, its network, the textbook's network, pairs of their equal weights)."""
    method, network = searching(*flags)
    args = method.args
    if args.space == 'nb201':
        book = textbook.NB201Network(args.init_channels, 4, args.cells_per_stage)
    else:
        book = textbook.Network(args.init_channels, 4, args.layers, partial=args.partial)
    return method, network, book, textbook.copy_weights(network, book)


def same_weights(pairs):
    for p, block, q in pairs:
        if p.requires_grad:
            close(p[block], q)


def refused(match, function, *given):
    """The call ends in a UserError that says so."""
    with pytest.raises(generate_data.UserError, match=match) as caught:
        function(*given)
    error = caught.value
    while error:                        # a DataLoader that stays in a frame takes seconds to end
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def log(folder):
    """The lines of a run's log, without what is measured."""
    lines = [json.loads(line) for line in Path(folder, 'log.jsonl').read_text().splitlines()]
    measured = 'seconds', 'images_per_second', 'peak_memory_mib'
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


def run(main, save, *flags):
    """The log of a run that ends well."""
    assert main([*flags, '--save', save]) == 0
    return log(save)


def printed(capsys, *flags):
    """(out, err) of a command of evaluate.py; in test_readme.py of the copy that is imported."""
    capsys.readouterr()
    assert sys.modules['evaluate'].main([*flags, '--gpu', '-1']) == 0
    return capsys.readouterr()


def reports(capsys, *flags):
    """What evaluate.py says of each run."""
    return [json.loads(row) for row in printed(capsys, *flags, '--json').out.splitlines()]


def stop_in_every_step(main, save, *flags, after=lambda: None):
    """Send this process SIGTERM in every step, call `after`, and resume: number of starts."""
    module = sys.modules[main.__module__]
    name = 'weight_step' if module.__name__ == 'search' else 'train_step'
    original, starts, status = getattr(module, name), 0, 143

    def step(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, step)
        while status == 143:
            starts, status = starts + 1, main([*flags, '--save', save, '--resume'])
            after()
    assert status == 0
    return starts


def same_run(a, b):
    """Two runs have the same log, result and weights, bit for bit."""
    assert log(a) == log(b)
    for name in ('genotype.json', 'scores.csv'):
        if Path(a, name).exists():
            assert Path(a, name).read_text() == Path(b, name).read_text()
    one, other = (torch.load(f'{run}/checkpoint.pt')['network'] for run in (a, b))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def one_line(capsys, status, needle):
    """The command ended with one line for the user, which names the thing."""
    said = [line for line in capsys.readouterr().err.splitlines()
            if not re.match(r'warning|making|wrote|tested|no CUDA|[\d,]+/|\S+: \d+ pict', line)]
    assert status == 2 and len(said) == 1, said
    assert re.match(r'\w+\.py: error: ', said[0]) and needle in said[0], said
    assert len(said[0]) < 400


def close(a, b, tolerance=1e-10):
    error = (a - b).norm()
    assert error <= tolerance * b.norm() + 1e-14, (error / b.norm()).item()
