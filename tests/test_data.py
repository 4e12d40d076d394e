"""Unreal data: how they are made, written, split and drawn in batches."""
import functools
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CPU, fake_cifar, folder_of_images, make_set, one_line, refused
from PIL import Image

import generate_data as g


def names(folder='.'):
    return sorted(p.name for p in Path(folder).iterdir() if p.suffix != '.lock')


def test_noise_labels_and_numbers_are_the_same_everywhere_and_none_reaches_the_next_class():
    for numbers, digest in (
            (g.noise_images(0, range(64), 32), '2e3fda780812c009'),
            (g.draw_labels(0, 1000, 10).astype('<i8'), 'f85b9bbe6c772afc'),
            (g.uniforms(0, g.DRAWS, range(3, 8), 32).astype('<f8'), '895fa71dee0f09cd')):
        assert hashlib.sha256(numbers.tobytes()).hexdigest()[:16] == digest
    numbers = g.uniforms(534, g.DRAWS, [22557], 32)    # one of them is 1 when rounded to float32
    assert numbers.max() < 1 and numbers.astype(np.float32).max() == 1
    images = g.Formula('fractal', np.zeros(22558, np.int64), 4, 8, 534)
    assert images.random([22557])[0].max() < 1


def test_label_modes_and_label_noise():
    true = np.repeat(np.arange(5), 40)
    for mode, even in (('uniform', False), ('balanced', True), ('permute', True)):
        labels = g.redraw_labels(true, 5, 1, mode, 1.0)
        assert (np.bincount(labels, minlength=5) == 40).all() == even
        assert 0.1 < (labels == true).mean() < 0.35
    for noise, same in ((0.5, 0.6), (0, 1)):
        labels = g.redraw_labels(true, 5, 1, 'uniform', noise)
        assert (labels == true).mean() == pytest.approx(same, abs=0.1 * noise)
    rows = np.eye(5, dtype=np.uint8)[true]
    for mode, axis, count in (('permute', 1, 1), ('balanced', 0, 100)):
        assert (g.redraw_labels(rows, 5, 1, mode, 1.0).sum(axis) == count).all()


def test_a_written_set_is_read_back_and_never_replaced(capsys):
    data = make_set('n', '--num_images', '120', '--seed', '3')
    laptop = '' if torch.cuda.is_available() else ' --preset laptop'
    script = shlex.quote(os.path.relpath(g.__file__).replace('generate_data', 'search'))
    assert f'next: python {script} --data n{laptop}\n' in capsys.readouterr().out
    meta, flags = json.loads(Path('n/meta.json').read_text()), ['--kind', 'noise', '--out', 'n']
    assert {'kind', 'seed', 'command', 'versions', 'sha256', 'classes'} <= set(meta)
    assert (data.images == g.noise_images(3, range(120), 8)).all() and data.kind == 'noise'
    assert (data.mean, data.std) == ([0.5] * 3, [0.12549019607843137] * 3)
    assert g.read('n', {}, 'test') is None and names() == ['n']     # no leftover
    assert Image.open('n/sheet.png').size[0] > 500 and data.labels.max() == 3
    one_line(capsys, g.main(flags), 'n exists')
    assert json.loads(Path('n/meta.json').read_text()) == meta


def test_a_sheet_shows_every_class():
    labels, several = np.array([0] * 500 + [1, 2]), np.zeros((300, 3), np.uint8)
    several[250, 2] = 1
    assert len(g.sheet_rows(labels)) == 100 and set(labels[g.sheet_rows(labels)]) == {0, 1, 2}
    assert len(g.sheet_rows(several)) == 100 and 250 in g.sheet_rows(several)
    assert len({k % 250 for k in g.sheet_rows(np.arange(3000) % 250)}) == 100


def test_a_log_file_gets_a_line_of_progress_before_10_s_of_silence(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(g.Progress, 'last', 0.0)
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    for _ in g.Progress(1000, 'images').over(range(1000)):
        now[0] += 0.1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12 and lines[0].startswith('80/1,000 images  10.0/s  0:01:32 left')
    now[0] += 30
    for _ in g.Progress(3, 'images').over(range(3)):    # what is short has none
        now[0] += 0.3
    assert not capsys.readouterr().err


def test_random_labels_refer_to_their_source():
    fake_cifar()
    data = make_set('r', '--label_mode', 'balanced', kind='random_labels')
    source = g.read('cifar10', {})
    assert not Path('r/images.npy').exists()
    assert (data.images == source.images).all() and (data.labels != source.labels).any()
    assert data.mean == source.mean and data.classes == list('abcdefghij')
    Path('data').rename('moved')
    refused('--data_dir', g.read, 'r', {})
    assert len(g.read('r', {'data_dir': 'moved'})) == 100
    assert g.main(['--kind', 'random_labels', '--out', 'small', '--image_size', '16', '--data_dir',
                   'moved']) == 0
    assert g.read('small', {'data_dir': 'moved'}).images.shape[1] == 16


def test_folders_are_named_by_settings_and_never_mixed_up():
    def find_or_make(kind, match=None, **changed):
        s = {**g.DEFAULTS, 'data_seed': 0, **changed}
        refused(match, g.find_or_make, kind, s) if match else g.find_or_make(kind, s)

    fake_cifar()
    folder_of_images('a/own', ('cat', '\u732b', 'long ' * 9), size=(8, 8))
    folder_of_images('b/own', size=(8, 8), n=5)
    find_or_make('noise', num_images=20, image_size=8, label_mode='balanced')
    find_or_make('random_labels', label_noise=0.5, data_seed=4)
    find_or_make('random_labels', source='a/own')       # with names that the sheet has to cut
    assert names('data') == [
        'cifar-10-batches-py', 'noise-image_size=8-num_images=20-label_mode=balanced-seed0',
        'random_labels-label_noise=0.5-seed4', 'random_labels-source=own-seed0']
    find_or_make('random_labels', 'was made with another source', source='b/own')
    folder = Path('cifar-10-batches-py')
    find_or_make('random_labels', label_noise=0.5, data_seed=4)         # found again
    shutil.copytree('data' / folder, 'other' / folder)
    shutil.copy('data' / folder / 'test_batch', 'other' / folder / 'data_batch_1')
    fake_cifar('relabelled', first=1)
    for place in ('other', 'relabelled'):
        find_or_make('random_labels', 'of other images or labels', label_noise=0.5, data_seed=4,
                     data_dir=place)


def make_or_wait(folder):
    torch.set_num_threads(1)                            # OpenMP's threads do not outlive a fork
    return g.main(['--kind', 'noise', '--out', folder, '--num_images', '200', '--gpu', '-1'])


def test_of_many_that_need_a_set_one_makes_it():
    with multiprocessing.get_context('fork').Pool(6) as pool:
        assert sorted(pool.map(make_or_wait, ['same'] * 6)) == [0] + [2] * 5
    assert len(g.read('same', {})) == 200 and names() == ['same']


@pytest.mark.parametrize('moment', range(3))
def test_a_killed_run_leaves_no_set_or_a_whole_one(moment):
    if os.fork() == 0:
        torch.set_num_threads(1)
        module, name = ((np, 'save'), (g, 'write_file'), (os, 'replace'))[moment]
        setattr(module, name, lambda *_, **__: os._exit(9))     # as kill -9: no `finally` is run
        make_set('n', '--num_images', '20')
        os._exit(0)
    os.wait()
    assert not Path('n').exists()
    assert len(make_set('n', '--num_images', '30')) == 30 and names() == ['n']


def test_split_is_stratified_exact_and_drawn_by_seed():
    labels = np.array([0] * 100 + [1] * 51 + [2] * 2 + [3])
    first, second = g.stratified_split(labels, 0.5, 0)
    assert sorted([*first, *second]) == list(range(154)) and (np.diff(first) != 1).any()
    assert np.bincount(labels[first]).tolist() == [50, 26, 1, 1]
    assert (first != g.stratified_split(labels, 0.5, 1)[0]).any()
    for n, fraction, share in ((5000, 0.025, 125), (100, 0.29, 29), (10, 0.11, 2)):
        assert len(g.stratified_split(np.zeros(n, int), fraction, 0)[0]) == share


@pytest.mark.parametrize('augment', ['standard', 'crop', 'imagenet', 'affine'])
def test_augmentation_in_workers_depends_on_seed_epoch_and_image_alone(augment, monkeypatch):
    folder_of_images('tree', 'ab', n=5, size=(96, 72))
    size = 65 if augment == 'imagenet' else 16
    data = g.read('tree', {'image_size': size, 'test_fraction': 0.0})
    state = torch.get_rng_state()

    def epoch(workers=0, epoch=1, start=0, seed=4):
        batches = g.Batches(data, range(10), 2, CPU, augment, 4, seed=seed, workers=workers)
        return torch.cat([x for x, _ in batches.epoch(epoch, start)])

    whole = epoch()
    monkeypatch.setattr(g, 'RESIDENT', 0)               # a large set: through a DataLoader
    assert torch.equal(whole, epoch(2)) and torch.equal(whole[6:], epoch(1, start=3))
    assert all((whole != x).any() for x in (epoch(epoch=2), epoch(seed=5)))
    assert torch.equal(state, torch.get_rng_state())    # a run that goes on draws the same
    with monkeypatch.context() as patch:
        full = Mock(side_effect=RuntimeError('No space left on device'))
        patch.setattr(torch.Tensor, 'share_memory_', full)
        refused('/dev/shm is full', epoch, 2)
    if size == 65:                                      # whose images are read in every epoch
        Path('tree/a/3.png').write_bytes(b'no image')
        for workers in (0, 2):
            refused('3.png: not a readable image', epoch, workers)


def test_augmentation_and_order_are_those_of_plain_loops():
    data = make_set('n', '--image_size', '16', kind='generated')
    batch, _ = next(g.Batches(data, range(40), 40, CPU, 'standard', 5, seed=1).epoch(2))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([1, 2])))
    order, draws = rng.permutation(40), rng.random((40, 11), np.float32)
    for x, k, u in zip(batch, order, draws):
        image = np.pad(data.images[k], ((2, 2), (2, 2), (0, 0)))
        top, left = (u[3:5] * 5).astype(int)
        image = image[top:top + 16, left:left + 16]
        image = image[:, ::-1] if u[0] < 0.5 else image
        wanted = (image / 255 - data.mean) / data.std
        row, column = (u[1:3] * 16).astype(int) - 2
        wanted[max(0, row):row + 5, max(0, column):column + 5] = 0
        assert np.allclose(x.permute(1, 2, 0), wanted, atol=1e-4)


def test_few_classes_of_spectrum_could_have_drawn_an_image():
    for classes in (10, 1000):
        formula = g.Formula('spectrum', np.arange(classes), classes, 8, 0)
        place = formula.points[:, :3] + formula.strays * (2 * torch.rand(classes, 3) - 1)
        near = (place[:, None] - formula.points[:, :3]).abs() <= formula.strays * 1.0001
        assert 1 <= near.all(2).sum(1).float().mean() < 1.5


@pytest.mark.parametrize('kind', [
    ['noise'], ['generated'], ['generated', '--generator', 'spectrum'],
    ['generated', '--generator', 'deadleaves'], ['generated', '--multilabel']])
def test_fresh_draws_every_image_anew_for_its_label(kind):
    threads = torch.get_num_threads()
    for name, count in (('one', 1), ('set', 2)):        # in chunks of 32 images
        torch.set_num_threads(count)
        make_set(name, *kind[1:], '--image_size', '32', kind=kind[0])
    torch.set_num_threads(threads)
    data = g.read('set', {'fresh': 2})
    assert np.array_equal(data.images, g.read('one', {}).images) and data.images.std() > 10
    batches = g.Batches(data, range(40), 20, CPU, shuffle=False, workers=0)
    seen = []
    for epoch in range(5):
        x, y = (torch.cat(part) for part in zip(*batches.epoch(epoch)))
        seen.append(x)
        assert torch.equal(y, batches.labels)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    flat = torch.cat([x.flatten(1) for x in (seen[0], seen[2], seen[4])])
    assert len(flat.unique(dim=0)) == 120       # nothing is seen twice
    stored = (torch.from_numpy(np.array(data.images)).float() - batches.mean) * batches.scale
    assert torch.allclose(seen[0], stored.permute(0, 3, 1, 2), atol=1e-5)
    assert np.array_equal(data.draw([45, 71, 48])[1:2], data.draw([71]))
    again = g.Batches(data, range(40), 20, CPU, shuffle=False, workers=2)
    assert torch.equal(torch.cat([x for x, _ in again.epoch(4, 1)]), seen[4][20:])
    if kind == ['noise']:                       # an image is that of its place in the stream
        stream = g.noise_images(0, range(120), 32)
        assert np.array_equal(data.draw([83, 97]), stream[[83, 97]])


def test_systems_are_contractive_and_of_the_published_size():
    maps, table = g.fractal_bank(3, 200)
    singular = np.linalg.svd(maps.double().numpy()[:, :, [0, 1, 3, 4]].reshape(200, 4, 2, 2),
                             compute_uv=False)
    assert singular.max() < 1 and np.allclose(singular[..., 0], maps[..., 6], atol=1e-5)
    count = table.amax(1).numpy() + 1
    assert set(count) == {2, 3, 4}
    for s, n in zip(singular, count):
        total = (s[:n, 0] + 2 * s[:n, 1]).sum()
        assert (5 + n) / 2 - 1e-4 <= total <= (6 + n) / 2 + 1e-4
    assert maps[..., [2, 5]].abs().max() <= 1


def test_leaves_have_their_shapes_and_the_first_is_in_front():
    areas = [np.pi, np.pi * (1 - 4 / 9), 3 * 3 ** 0.5 / 4, 4 * 0.98 * 0.14]
    for shape, area in enumerate(areas):
        leaves = [[shape, 100.0, 0.4, 128.0, 128.0], [0, 120.0, 0.0, 128.0, 128.0]]
        drawn = g.draw_leaves(leaves, [[255] * 3, [9] * 3], 256)
        assert abs((drawn == 255).mean() * 256 ** 2 / 100 ** 2 - area) < 0.05 * area + 0.02


def test_generated_sets_are_balanced_and_x_rays_have_the_shares_of_chexpert():
    data = make_set('a', kind='generated')
    assert data.kind == 'generated' and (np.bincount(data.labels) == 10).all()
    assert np.allclose(data.images.mean((0, 1, 2)) / 255, data.mean)
    assert np.allclose(data.images.std((0, 1, 2)) / 255, data.std)
    xray = make_set('xray', '--multilabel', '--num_classes', '14', kind='generated')
    labels = g.uniforms(0, g.LABELS, range(20000), 14) < list(g.CHEXPERT.values())
    assert np.allclose(labels.mean(0), list(g.CHEXPERT.values()), atol=0.015)
    assert xray.classes == list(g.CHEXPERT) and xray.labels.shape == (40, 14)
    assert (xray.images == xray.images[..., :1]).all()


def test_trained_generator_stops_and_goes_on(capsys, monkeypatch):
    narrow = functools.partial(g.UNet, emb=32, widths=(16, 16, 16, 16))
    monkeypatch.setattr(g, 'UNet', narrow)
    folder_of_images('own', size=(8, 8))
    flags = ['--image_size', '8', '--kind', 'generated', '--generator', 'train', '--source', 'own',
             '--num_images', '8', '--generator_steps', '22', '--out']
    assert g.main([*flags, 'whole']) == 0
    assert g.main([*flags, 'part', '--generator_steps', '20', '--num_images', '10']) == 0
    left = Path('part.generator/.checkpoint.pt.tmp')
    left.touch()                                        # of a run that was killed while saving
    shutil.rmtree('part')
    assert g.main([*flags, 'part/']) == 0
    assert not left.exists()
    assert (np.load('whole/images.npy') == np.load('part/images.npy')).all()
    data = g.read('whole', {})
    assert data.classes == ['cat', 'dog'] and (np.bincount(data.labels) == 4).all()
    capsys.readouterr()
    shutil.rmtree('part')
    one_line(capsys, g.main([*flags, 'part', '--generator_steps', '9']), 'more steps')
    one_line(capsys, g.main([*flags, 'part', '--seed', '1']), 'part.generator')
    assert g.main([*flags, 'odd', '--image_size', '17', '--generator_steps', '1']) == 0
    Path('part.generator/checkpoint.pt').write_bytes(b'damaged')
    one_line(capsys, g.main([*flags, 'part']), 'damaged')
    # A set with several labels.
    labels = make_set('labels', '--multilabel').labels
    assert g.main([*flags[2:], 'made', '--source', 'labels', '--generator_steps', '1']) == 0
    assert {*map(tuple, g.read('made', {}).labels)} <= {*map(tuple, labels)}
    s = {**g.DEFAULTS, 'generator': 'train', 'source': 'own', 'data_seed': 0}
    refused('generate_data.py', g.find_or_make, 'generated', s)


def test_flow_is_a_straight_line_between_noise_and_images():
    class Velocity(torch.nn.Module):                    # towards 3, the same for every label
        def forward(self, x, t, y):
            return (3 - x) / (1 - t)[:, None, None, None]
    x = g.sample_flow(Velocity(), torch.randn(5, 3, 8, 8), torch.zeros(5, 3))
    assert torch.allclose(x, torch.full_like(x, 3), atol=1e-4)
