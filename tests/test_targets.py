"""Real data: readers of CIFAR, folders, ImageNet and CheXpert, and how images are augmented."""
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (COLUMNS, CPU, ROOT, SIZES, chexpert, fake_cifar, folder_of_images, imagenet,
                      make_set, one_line, printed, python2_pickle, read_rows, refused, reports, run,
                      write_rows)
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import evaluate
import generate_data as g
import retrain
import search
from genotypes import random_cell


def test_cifar_is_read_as_python_2_wrote_it(capsys):
    folder = fake_cifar()
    data = np.random.default_rng(1).integers(0, 256, (7, 3072), np.uint8)
    (folder / 'data_batch_1').write_bytes(python2_pickle({'data': data, 'labels': [*range(7)]}))
    train, test = g.read('cifar10', {}), g.read('cifar10', {}, 'test')
    assert len(train) == 87 and len(test) == 20
    assert (train.images[3].transpose(2, 0, 1).ravel() == data[3]).all() and train.labels[3] == 3
    assert len(g.read('cifar10', {'data_dir': str(folder)})) == 87      # the folder itself, too
    assert 'are not the official ones' in capsys.readouterr().err
    small = g.read('cifar10', {'image_size': 16}).images
    assert small.shape == (87, 16, 16, 3) and abs(small.mean() - train.images.mean()) < 3
    Path('data/cifar-100-python').mkdir()
    for name, content in (('train', {'data': data, 'fine_labels': [99] * 7}),
                          ('meta', {'fine_label_names': [str(k) for k in range(100)]})):
        Path('data/cifar-100-python', name).write_bytes(python2_pickle(content))
    assert g.read('cifar100', {}).labels.tolist() == [99] * 7


@pytest.mark.parametrize('calls', [
    (os.system, ('touch evil',)), (open, ('evil', 'w')), (memoryview, (b'x' * 3072,))])
def test_a_crafted_pickle_is_one_line_and_is_not_run(calls, capsys):
    data = type('Runs', (), {'__reduce__': lambda self: calls})()
    (fake_cifar() / 'data_batch_2').write_bytes(pickle.dumps({'data': data, 'labels': [0]}))
    one_line(capsys, g.main(['--kind', 'random_labels', '--out', 'x']), 'data_batch_2')
    assert not Path('evil').exists()


def test_image_folders_of_any_depth_of_colour_and_turned_images(monkeypatch):
    folder_of_images('tree/train')
    folder_of_images('tree/val', n=2)
    train, test = (g.read('tree', {'image_size': 8}, split) for split in ('train', 'test'))
    assert (len(train), len(test)) == (8, 4) and train.images.shape[1:] == (8, 8, 3)
    assert train.mean == test.mean
    with monkeypatch.context() as patch:
        patch.setattr(g, 'AT_ONCE', 7)                  # of more files each is read when needed
        later = g.read('tree', {'image_size': 8})
    assert later.images is None and (later.image(5) == train.images[5]).all()
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save('tree/train/cat/deep.png')           # 16 bits, grey
    Image.fromarray((ramp // 256).astype(np.uint8)).save('tree/train/cat/grey.jpg')
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save('tree/train/cat/rgba.png')
    assert (g.read_image('tree/train/cat/rgba.png', 8) == 255).all()    # transparent: white
    Image.fromarray(ramp / np.float32(65535)).save('fractions.tiff')
    refused('fractions.tiff: .*its pixels are fractions', g.read_image, 'fractions.tiff', 8)
    Image.fromarray(ramp // 16).save('scan.png')
    refused('scan.png: .*no pixel is above 4095', g.read_image, 'scan.png', 8)
    deep = g.read_image('tree/train/cat/deep.png', 64)
    assert len(np.unique(deep)) == 256 and len(g.read('tree', {'image_size': 16})) == 11
    upright = Image.fromarray(np.arange(40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8))
    upright.save('upright.png')
    upright.save('damaged.png', exif=b'Exif\0\0II*')     # too short
    assert (g.read_image('damaged.png', 16) == g.read_image('upright.png', 16)).all()
    exif = upright.getexif()
    exif[274] = 6                                       # lies on its side, by a quarter of a turn
    for name in ('side.png', 'side.tiff'):
        upright.transpose(Image.ROTATE_90).save(name, exif=exif)
        assert (g.read_image(name, 16) == g.read_image('upright.png', 16)).all()


@pytest.mark.parametrize('name, needle', [
    ('eps', 'cannot identify'), ('bomb', 'pixels'), ('cut', 'truncated')])
def test_a_hostile_image_is_one_line(name, needle, capsys):
    folder_of_images('own')
    path = Path('own/cat/0.png')
    if name == 'bomb':
        Image.new('1', (14000, 14000)).save(path)
    else:
        eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(evil) (w) file\n'
        path.write_bytes(eps if name == 'eps' else path.read_bytes()[:50])
    one_line(capsys, g.main(['--kind', 'random_labels', '--source', 'own', '--out', 'x']), '0.png')
    refused(needle, g.read_image, path, 8)


def test_imagenet_tree_is_read_as_it_lies_on_disk():
    imagenet('in')
    red = Image.new('RGB', (90, 90), (200, 10, 10))
    red.convert('CMYK').save('in/val/n01/cmyk.JPEG', 'JPEG')
    red.save('in/val/n01/disguised.JPEG', 'PNG')
    red.convert('L').save('in/val/n01/grey.JPEG', 'JPEG')
    where = {'data_dir': 'in', 'image_size': 64}
    train, test = (g.read('imagenet', where, split) for split in ('train', 'test'))
    assert train.classes == ['n01', 'n02', 'n03'] and len(train) == 24 and len(test) == 9
    assert train.mean == [0.485, 0.456, 0.406]
    assert g.read('imagenet', {'data_dir': 'in'}).images is None
    cmyk, disguised, grey = (test.image(k).astype(int) for k in range(2, 5))
    assert abs(cmyk - (200, 10, 10)).max() < 12 and (disguised == (200, 10, 10)).all()
    assert (grey == grey[0, 0, 0]).all()
    Path('in/train/n02/3.JPEG').write_bytes(b'not an image')
    refused('3.JPEG', g.read, 'imagenet', where)
    refused('nowhere/imagenet/train', g.read, 'imagenet', {'data_dir': 'nowhere'})


def test_crops_are_those_of_random_resized_crop():
    """The crop of torchvision from a ramp: its middle tells where it lies, its range how large."""
    ramp = np.zeros((400, 600, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 600), np.linspace(0, 255, 400)[:, None]
    Image.fromarray(ramp).save('ramp.png')
    for seed in range(30):
        torch.manual_seed(seed)
        x = g.read_image('ramp.png', 16, 8 / 7, crop=True).astype(int)
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(
            torch.zeros(1, 400, 600), (0.08, 1), (3 / 4, 4 / 3))
        for channel, start, length, side in ((0, left, width, 600), (1, top, height, 400)):
            assert abs(x[..., channel].mean() / 255 - (start + length / 2) / side) < 0.01
            assert abs(np.ptp(x[..., channel]) / 255 - length / side) < 0.1


def test_augmentations_keep_what_they_should():
    pixels = np.zeros((6, 72, 72, 3), np.uint8)
    pixels[:, :, :36] = 255                                         # left half white
    data = g.Data('x', 'real', pixels, np.zeros((6, 14), np.uint8), list(g.CHEXPERT), [.5] * 3,
                  [.2] * 3, 72)
    one_label = g.replace(data, labels=np.zeros(6, int))            # what `auto` is
    assert g.auto_augment(data) == 'affine' and g.auto_augment(one_label) == 'imagenet'
    assert g.auto_augment(g.replace(one_label, image_size=64)) == 'standard'
    assert g.auto_augment(g.replace(one_label, kind='noise')) == 'none'
    sides = {}
    for augment in ('affine', 'crop'):
        batches = g.Batches(data, range(6), 6, CPU, augment, workers=0)
        x = torch.cat([next(batches.epoch(k))[0] for k in range(4)])
        sides[augment] = x[:, 0, :, 10:26].mean((1, 2)) > x[:, 0, :, 46:62].mean((1, 2))
        assert (x.std(0) > 0).any()
    assert sides['affine'].all() and 3 < sides['crop'].sum() < 21


@pytest.mark.parametrize('layout, prefix, inside', [
    ('CheXpert-v1.0-small', None, ''), ('CheXpert-v1.0', 'CheXpert-v1.0-small', ''),
    ('CheXpert-v1.0', '/mnt/other/CheXpert-v1.0', 'CheXpert-v1.0')])
def test_chexpert_layouts(layout, prefix, inside):
    chexpert('d', layout, prefix, columns=COLUMNS[::-1])
    where = {'data_dir': str(Path('d', inside)), 'image_size': 16}
    train, valid = (g.read('chexpert', where, split) for split in ('train', 'test'))
    assert len(train) == 12 and len(valid) == 6 and train.classes == list(g.CHEXPERT)
    assert train.images.shape == (12, 16, 16, 3) and train.studies[3] == 'patient00003/study1'
    assert len(g.read('chexpert', {**where, 'views': 'all'})) == 24
    assert (train.mean, train.std) == (valid.mean, valid.std)
    assert len({g.find_or_make('random_labels', {
        **g.DEFAULTS, **where, 'data_seed': 0, 'source': 'chexpert', 'uncertain': policy}).name
        for policy in ('ones', 'zeros')}) == 2


def test_uncertain_labels():
    chexpert('d')
    names, cells = list(g.CHEXPERT), np.arange(12)
    for policy, *wanted in (('mixed', 0, 1), ('ones', 1, 1), ('zeros', 0, 0), ('ignore', -1, -1)):
        s = {'data_dir': 'd', 'image_size': 16, 'uncertain': policy}
        for name, value in zip(('Pneumonia', 'Atelectasis'), wanted):
            k = names.index(name)
            wanted_by_cell = np.array([0, 1, 0, value])[(cells + k) % 4]
            assert (g.read('chexpert', s).labels[:, k] == wanted_by_cell).all()


def test_chexpert_that_is_damaged_is_one_line():
    damaged = g.read, 'chexpert', {'data_dir': 'd', 'image_size': 16}
    refused('train.csv', *damaged)
    chexpert('d')
    table = Path('d/CheXpert-v1.0-small/train.csv')
    whole = table.read_text()
    for text, needle in ((whole.replace('Edema', 'Oedema'), 'Edema'),
                         (whole.replace('-1.0', '-2.0', 1), 'line 2: '),
                         (','.join(whole.split(',')[:-3]), 'no cell'),     # cut in its last line
                         (whole.splitlines()[0] + '\n', 'no rows'),
                         (whole + whole.splitlines()[-1] + '\n', 'has a row already'),
                         (whole.replace('/patient00003/study1/', '/ward/'), 'line 8: the path is'),
                         (whole.replace('patient0000', 'patient9990'), 'patient99900'),
                         ('\0\0', 'CSV')):
        table.write_text(text)
        refused(re.escape(needle), *damaged)


def test_pictures_without_val_hold_out_about_a_fifth(capsys):
    folder_of_images('own', n=40)
    train, test = (g.read('own', {'image_size': 8}, split) for split in ('train', 'test'))
    assert 8 <= len(test) <= 24 and len(train) + len(test) == 80 and test.mean == train.mean
    assert not {*train.files} & {*test.files}
    shutil.copytree('own', 'deep/train')
    assert np.array_equal(g.read('deep', {'image_size': 8}, 'test').images, test.images)
    Path('own').rename('moved')
    again = g.read('moved', {'image_size': 8}, 'test')
    assert np.array_equal(again.images, test.images)
    for k, file in enumerate([*again.files, *g.read('moved', {'image_size': 8}).files]):
        shutil.copy(file, f'moved/dog/copy{k}.png')     # on the side of what it copies
    more = g.read('moved', {'image_size': 8}, 'test')
    assert len(more) == 2 * len(test) and {*again.files} < {*more.files}
    for copy in Path('moved').glob('dog/copy*'):
        copy.unlink()
    whole = {'image_size': 8, 'test_fraction': 0.0}
    assert len(g.read('moved', whole)) == 80 and g.read('moved', whole, 'test') is None
    said = capsys.readouterr().err
    few, many = sorted(np.bincount(test.labels))
    assert f'80 pictures of 2 classes (cat, dog); the test has {len(test)}, ' \
        f'{few} to {many} a class\n' in said and '(cat, dog); the test has none\n' in said
    refused('cat has no pictures to train on', g.read, 'moved', {'test_fraction': 1 - 1e-9})
    folder_of_images('vehicles', ('bus', 'train'))      # a class may be called train
    assert g.read('vehicles', {}).classes == ['bus', 'train']
    folder_of_images('flat', ('train', 'val'))          # but these are no classes
    refused('flat/train is no folder of images', g.read, 'flat', {})
    Path('cased').mkdir()
    for name, n in (('Train', 3), ('validation', 2), ('test', 1)):
        folder_of_images(f'cased/{name}', n=n)
    assert len(g.read('cased', {})) == 6 and len(g.read('cased', {}, 'test')) == 4
    said = capsys.readouterr().err
    assert '(cat, dog); the test has 4, 2 to 2 a class, from validation/\n' in said


def test_pictures_that_cannot_be_read_are_named_at_once_or_skipped(capsys):
    for split in ('train', 'val'):
        folder_of_images(f'own/{split}')
        for name in ('one', 'two'):
            Path(f'own/{split}/cat/{name}.jpg').write_bytes(b'no picture')
    Path('own/train/cat/notes.txt').touch()
    Path('own/train/.ipynb_checkpoints').mkdir()
    refused('cannot be read: 4, .*one.jpg, .*val.*one.jpg', g.read, 'own', {})
    assert len(g.read('own', {'skip_broken': True})) == 8
    assert len(g.read('own', {'skip_broken': True}, 'test')) == 8
    said = capsys.readouterr().err
    assert 'files left out: 1, e.g. notes.txt: no JPEG, PNG, BMP, WebP, TIFF or PPM' in said
    assert 'broken pictures left out: 4' in said
    for path in Path('own/train/cat').glob('*.png'):
        path.write_bytes(b'no picture')
    refused('has no pictures to train on', g.read, 'own', {'skip_broken': True})


def test_search_retrain_and_evaluate_on_imagenet(capsys):
    imagenet('in')
    flags = [*SIZES, '--batch_size', '4', '--data', 'imagenet', '--data_dir', 'in', '--image_size',
             '72', '--warmup_epochs', '1']
    lines = run(search.main, 'r', *flags, '--method', 'pcdarts', '--train_portion', '0.6',
                '--valid_fraction', '0.4', '--workers', '1', '--frozen_epochs', '0')
    assert lines[-1]['genotype'] and lines[0]['learning_rate'] == pytest.approx(0.5 * 4 / 1024)
    args = search.parse([*flags, '--train_portion', '0.6', '--valid_fraction', '0.4'])
    data = g.read('imagenet', vars(args))               # without colour jitter, as published
    assert [b.augment for b in search.make_batches(data, args, 'cpu')] == ['crop'] * 2
    lines = run(retrain.main, 'n', *flags, '--arch', 'r')
    row, = reports(capsys, 'n')
    assert row['test_error'] == lines[-1]['test_error'] and row['test_n'] == 6
    network, meta = evaluate.load_weights('n/weights.pt')
    assert meta['stem'] == 'imagenet' and len(network.stem1) == 3
    for more in (['random_labels', '--source', 'imagenet', '--train_portion', '0.5',
                  '--valid_fraction', '0.5'],
                 ['noise', '--preset', 'imagenet', '--num_classes', '3', '--num_images', '60']):
        run(search.main, more[0], *flags, '--steps_per_epoch', '1', '--data', *more)
    Path('in/train/n01/3.JPEG').write_bytes(b'no')      # a worker finds it; the others must end too
    done = subprocess.run([sys.executable, ROOT / 'search.py', *flags, '--train_portion', '0.5',
                           '--valid_fraction', '0.5'], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and '3.JPEG: not a readable' in done.stderr.splitlines()[-1]
    Path('in/val/n03').rename('in/val/n04')
    refused('differ in their classes: n03, n04', g.read, 'imagenet', {'data_dir': 'in'}, 'test')


def test_search_retrain_and_evaluate_on_chest_x_rays(capsys):
    chexpert('d', patients=40)
    flags = [*SIZES, '--batch_size', '4', '--data_dir', 'd', '--image_size', '16']
    halves = ['--train_portion', '0.5', '--valid_fraction', '0.5']
    run(search.main, 'r', *flags, '--data', 'chexpert', *halves)
    data = g.read('chexpert', {'data_dir': 'd', 'image_size': 16, 'views': 'all'})
    patients = np.array([study.split('/')[0] for study in data.studies])
    for seed in '012':                                  # no patient is in both parts
        first, second = search.two_parts(data, search.parse(['--seed', seed]))
        assert len(first) == len(second) == 40
        args = retrain.parse(['--arch', 'DARTS_V2', '--holdout_patients', '0.3', '--seed', seed])
        for rows, others in ((first, second), retrain.split_rows(data, args)):
            assert len(others) and not {*patients[rows]} & {*patients[others]}
    training = [*flags, '--data', 'chexpert', '--arch', 'r', '--holdout_patients', '0.2',
                '--uncertain', 'ignore', '--views', 'all']
    lines = run(retrain.main, 'n', *training)
    run(retrain.main, 'n', *training, '--data_dir', 'elsewhere', '--resume')    # only reads it
    assert capsys.readouterr().err.endswith('note: n was run with --data_dir d\n')
    best = min(lines, key=retrain.badness)
    row, = reports(capsys, 'n')
    assert row['test_auroc_tasks'] == pytest.approx(best['test_auroc_tasks'], abs=1e-9)
    assert row['test_n'] == 6                           # studies, of two views each
    assert 'Fracture' not in row['test_areas'] and len(row['test_areas']) == 13
    assert 'Fracture                     AUROC not defined, 0 of' in printed(capsys, 'n').out
    assert all(low <= area <= high for area, low, high, *_ in row['test_areas'].values())
    assert lines[-1]['train_accuracy'] is None          # nearly all labels are 0
    shutil.copytree('d/CheXpert-v1.0-small/valid', 'site/valid')        # other images, same names
    for path in Path('site').rglob('*.jpg'):
        Image.new('L', (16, 16)).save(path)
    shutil.copy('d/CheXpert-v1.0-small/valid.csv', 'site')
    black, = reports(capsys, 'n', '--test_labels', 'site/valid.csv')
    assert black['test_auroc'] == 0.5 and black['tested_on'] == 'site/valid.csv'
    # Labels of the test set: by study, its images in test/ beside them.
    os.rename('d/CheXpert-v1.0-small/valid', 'd/test')
    rows = {'/'.join(['test', *r['Path'].split('/')[-3:-1]]): {k: r[k] for k in g.CHEXPERT}
            for r in read_rows('d/CheXpert-v1.0-small/valid.csv')}
    for name, cells in (('labels', {}), ('unsure', dict.fromkeys(g.CHEXPERT, '-1.0'))):
        write_rows(f'd/{name}.csv', [{'Study': study, **row, **cells}
                                     for study, row in rows.items()], ['Study', *g.CHEXPERT])
    again, = reports(capsys, 'n', '--test_labels', 'd/labels.csv')
    assert again['test_areas'] == row['test_areas']
    said = printed(capsys, 'n', '--test_labels', 'd/CheXpert-v1.0-small/train.csv')
    assert '40 of its patients are in train.csv too' in said.err
    printed(capsys, 'n', '--test_labels', 'd/labels.csv', '--scores', 's.csv', '--plot', 'roc.svg')
    assert 'false positive rate' in Path('roc.svg').read_text()
    scores = {(r['image'], r['label']): float(r['score']) for r in read_rows('s.csv')}
    assert len(scores) == 6 * 14 and all(0 < score < 1 for score in scores.values())
    for name, (area, *_) in row['test_areas'].items():
        mine = np.array([scores['/'.join(study.split('/')[-2:]), name] for study in rows])
        truth = np.array([float(r[name] or 0) for r in rows.values()])
        assert evaluate.auroc(mine, truth) == pytest.approx(area)
    settings = {'data_dir': 'd', 'image_size': 16, 'uncertain': 'ones', 'views': 'all'}
    data = g.read_chexpert('chexpert', settings, 'test', 'd/unsure.csv')
    assert (data.labels == -1).all()                    # which no metric counts
    Path('d/CheXpert-v1.0-small/valid.csv').unlink()
    assert g.read('chexpert', {'data_dir': 'd'}, 'test') is None
    refused('patients, .* --data chexpert', g.read, 'd/CheXpert-v1.0-small', {})
    one_line(capsys, evaluate.main(['n', '--test_labels', 'none.csv']), 'none.csv is no file')
    refused('r: no train.csv in it, nor in a CheX', g.read, 'chexpert', {'data_dir': 'r'})
    next(Path('d/test').glob('*/*')).rename('d/moved')
    one_line(capsys, evaluate.main(['n', '--test_labels', 'd/labels.csv']), 'has no views')
    one_line(capsys, retrain.main([*flags, '--data', 'chexpert', '--arch', 'r', '--save', 's',
                                   '--label_smoothing', '0.1']), 'several labels')


def test_presets_are_the_published_recipes():
    def expect(script, flags, **values):
        args = script.parse(flags.split())
        assert values.items() <= vars(args).items(), flags
        return args

    args = expect(search, '--data imagenet --method pcdarts', batch_size=1024, learning_rate=0.5,
                  arch_learning_rate=6e-3, arch_grad_clip=5, warmup_epochs=5, frozen_epochs=35,
                  partial=2, train_portion=0.1, valid_fraction=0.025, image_size=224)
    assert round(retrain.learning_rate_at(args, 15, 50), 4) == 0.3969
    for method in ('sdarts', 'betadarts'):
        expect(search, f'--space nb201 --method {method}', epochs=100, nesterov=False,
               weight_decay=3e-4)
    expect(search, '--method gdas', epochs=250, layers=6, batch_size=256, weight_decay=5e-4,
           nesterov=True)
    expect(search, '--data random_labels --source chexpert', image_size=224)
    expect(retrain, '--arch ' + random_cell('nb201', 0), epochs=200, learning_rate=0.1, layers=17,
           grad_clip=0)
    expect(retrain, '--arch DARTS_V2 --data chexpert', optimizer='adam', learning_rate=1e-4,
           image_size=320, holdout_patients=0.02)
    expect(retrain, '--arch DARTS_V2 --data chexpert --preset laptop', image_size=16,
           holdout_patients=0.1)
    # The learning rate on ImageNet is that of PC-DARTS and follows the batch.
    expect(search, '--data imagenet --batch_size 512', learning_rate=0.25)
    expect(search, '--data imagenet --batch_size 512 --learning_rate 0.3', learning_rate=0.3)
    # Of a short run the warm-up is the same share.
    expect(retrain, '--arch DARTS_V2 --data imagenet --epochs 10', warmup_epochs=0)
    args = expect(retrain, '--arch DARTS_V2 --data imagenet', epochs=250, layers=14,
                  batch_size=1024, learning_rate=0.5, schedule='linear', warmup_epochs=5,
                  weight_decay=3e-5, label_smoothing=0.1, init_channels=48)
    rates = [retrain.learning_rate_at(args, epoch, 250) for epoch in range(250)]
    falling = [0.5 * (245 - epoch) / 245 for epoch in range(245)]
    last = [0.5 * (250 - epoch) / (5 * 245) for epoch in range(245, 250)]
    warm_up = np.minimum(1, np.arange(1, 251) / 5)
    assert np.allclose(rates, np.multiply(falling + last, warm_up))
    make_set('set')                                     # unreal data are split in larger shares
    for data in ('noise', 'generated', 'set'):
        expect(search, f'--data {data} --preset imagenet', train_portion=0.8, valid_fraction=0.2)
    expect(search, '--data imagenet --preset imagenet', train_portion=0.1, valid_fraction=0.025)
    expect(search, '--preset imagenet', num_classes=1000, num_images=128000, image_size=224)


def test_unknown_labels_add_nothing_and_smoothing_is_the_mean_over_classes():
    logits, y = torch.randn(3, 4, requires_grad=True), torch.tensor([[0., 1, -1, 1]] * 3)
    evaluate.loss_of(logits, y).backward()
    assert (logits.grad[:, 2] == 0).all() and (logits.grad[:, [0, 1, 3]] != 0).all()
    logits, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    smooth = 0.9 * torch.eye(4)[y] + 0.1 / 4
    wanted = -(smooth * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(evaluate.loss_of(logits, y, 0.1), wanted)
