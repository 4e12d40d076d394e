"""Bad input: one clear line that names the thing, exit status 2, nothing left behind."""
import errno
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import (DARTS, NOISE, ONE_STEP, RETRAIN, TINY, folder_of_images, make_set, one_line,
                      run)

import evaluate
import generate_data
import genotypes
import retrain
import search

GOOD = genotypes.DARTS_V2.normal


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    """A folder with what bad commands meet: a set, pictures, a search and a retraining."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('store'))
        make_set('set', '--num_images', '64')
        folder_of_images('own/train')
        folder_of_images('own/val')
        run(search.main, 'run', *TINY)
        run(retrain.main, 'net', *RETRAIN)
        return Path.cwd()


def put(text):
    """The command that writes genotype.json."""
    return f'echo {shlex.quote(text)} > genotype.json'


def genotype(**changes):
    return put(json.dumps({**genotypes.DARTS_V2._asdict(), **changes}))


# Commands; the line of the error names the first flag of each
REFUSED = {
    'generate_data': '''--label_noise 0.5 --kind noise --out x; --data_dir d --kind noise --out x
        --label_mode permute --kind noise --out x; --out noise --kind noise
        --multilabel --kind generated --generator spectrum --out x''',
    'search': '''--nosuch 3; --batch_size 0; --batch_size 8 --grad_accum 3; --learning_rate nan
        --partial 3; --layers 5; --early_stop; --early_stop --epochs 5
        --method pdarts; --epochs 2 --space darts --method pdarts --frozen_epochs 0
        --epochs 2 --method synflow; --epochs 2 --method random; --augment crop --method naswot
        --stem imagenet --space darts
        --frozen_epochs 2; --warmup_epochs 2; --unrolled --method gdas; --hessian 1 --arch_data none
        --arch_data train --method oneshot; --repeats 2 --method oneshot; --score angle
        --candidates 5; --fresh --data cifar10; --fresh 2 --data random_labels''',
    'retrain': '--arch DARTS_V3; --auxiliary --arch DARTS_V2; --drop_path_prob 2 --arch DARTS_V2',
    'evaluate': '--csv t.csv --arch DARTS_V2; --plot cell.png --arch DARTS_V2'}
ARCH = '--arch genotype.json --data noise'
SPOIL = 'printf other | dd conv=notrunc bs=1 of=set/'
TABLE = [
    # what is there, a command that harms it, script, flags, what the line names
    ('', '', 'generate_data', '--kind random_labels --out x --source nowhere', 'nowhere'),
    ('', '', 'generate_data', '--kind random_labels --out x', 'cifar-10-batches-py'),
    ('own', '', 'generate_data', '--kind random_labels --source own --out own/x', 'own/x'),
    ('', 'echo { > file', 'generate_data', '--kind noise --out file/x', 'file'),
    ('own', '', 'search', '--save own', 'own'),
    ('set', 'truncate -s 60 set/meta.json', 'search', '--data set', 'meta.json'),
    ('set', SPOIL + 'images.npy seek=12000', 'search', '--data set', 'other images'),
    ('set', SPOIL + 'labels.npy seek=600', 'search', '--data set', 'other labels'),
    ('set', '', 'search', '--data set --image_size 16', '--image_size 8'),
    ('own', 'mkdir -p own/train/empty', 'search', '--data own --image_size 8', 'empty'),
    ('own', 'mkdir -p own/val/cow', 'retrain', '--arch DARTS_V2 --data own --image_size 8', 'cow'),
    ('', 'mkdir -p own/cats', 'search', '--data own', 'folders in it: cats'),
    ('net', '', 'evaluate', 'net --test_labels t.csv', '--test_labels'),
    ('own', '', 'search', '--data own --image_size 8', 'the 4 images of its split of own'),
    ('', '', 'search', '--epochs 1' + 400 * '0', '--epochs'),
    ('run', '', 'search', '--save run', '--resume'),
    ('run', 'rm run/genotype.json', 'search', '--save run --resume --epochs 9',
     'with --epochs 2, not 9, by `python '),
    ('', '', 'search', '--train_portion 60 --valid_fraction 0.7', 'more than all'),
    ('', '', 'retrain', '', '--arch'),
    ('', '', 'retrain', '--arch |x~0|', 'op is one of'),
    ('net', '', 'retrain', '--arch net', 'net'),
    ('', put('{'), 'retrain', ARCH, 'genotype.json'),
    ('', put('Genotype() Genotype()'), 'retrain', ARCH, 'it has 2 of'),
    ('', put("X = Genotype(normal=[('"), 'retrain', ARCH, 'no genotype'),
    ('', put('Genotype(normal=open("evil","w"))'), 'retrain', ARCH, 'Genotype(...)'),
    ('', put('Genotype(normal=[],normal_concat=range(0,9999999999))'), 'retrain', ARCH,
     'no genotype'),
    ('', genotype(normal=GOOD[:7]), 'retrain', ARCH, '7 operations'),
    ('', genotype(normal=(('conv_9x9', 0), *GOOD[1:])), 'retrain', ARCH, 'conv_9x9'),
    ('', genotype(reduce=(('skip_connect', 2), *GOOD[1:])), 'retrain', ARCH, 'skip_connect:2'),
    ('', genotype(normal=(GOOD[1], *GOOD[1:])), 'retrain', ARCH, 'normal[1]'),
    ('', genotype(reduce_concat=[2, 2, 3]), 'retrain', ARCH, 'reduce_concat'),
    ('', put('{}'), 'retrain', '--data noise --arch ' + 'Genotype' * 40, 'neither'),
    ('', '', 'evaluate', '', 'runs, or --arch'),
    ('', '', 'evaluate', '--arch DARTS_V2 run', 'runs, or --arch'),
    ('', '', 'retrain', '--arch |none~0|+|none~0|none~1|+|none~0|none~1|none~2| --layers 6', '6'),
    ('own', '', 'evaluate', 'own', 'own is no run'),
    ('', '', 'search', '--batch-size 4', 'did you mean --batch_size?'),
    ('run', 'echo { > run/args.json', 'evaluate', 'run', 'args.json'),
    ('run', '', 'evaluate', 'run --csv nowhere/t.csv', 'nowhere'),
    ('run', '', 'evaluate', 'run --plot p.txt', 'p.txt'),
    ('run', 'mkdir -p p.svg', 'evaluate', 'run --plot p.svg', 'p.svg'),
    ('run', 'rm run/genotype.json', 'evaluate', 'run --csv t.csv', 'none of these runs'),
    ('run', '', 'evaluate', 'run --predict own', 'run is no finished retraining'),
    ('net', 'truncate -s 2000 net/weights.pt', 'evaluate', 'net', 'weights.pt'),
    ('net', '', 'evaluate', 'net --predict nowhere.png', 'nowhere.png'),
    ('net', '', 'evaluate', 'net --scores s.csv', 'test images'),
]
for script, text in REFUSED.items():
    for flags in re.split('[;\n]', text):
        TABLE.append(('', '', script, flags, flags.split()[0]))


def files():
    return {str(p): p.stat().st_size for p in Path('.').rglob('*') if p.is_file()}


@pytest.mark.parametrize('there, change, script, flags, needle', TABLE)
def test_one_line_and_nothing_left(there, change, script, flags, needle, capsys, store):
    if there:
        shutil.copytree(store / there, there)
    subprocess.run(change, shell=True, check=True)
    before, flags = files(), flags.split()
    base = {'search': DARTS if 'darts' in flags else TINY, 'retrain': RETRAIN[2:]}.get(script, [])
    if '--data' in flags and 'noise' not in flags:
        base = base[len(NOISE):]
    capsys.readouterr()
    one_line(capsys, sys.modules[script].main([*base, *flags]), needle)
    after = files()
    assert {path: after.get(path) for path in before} == before
    new = [path for path in after.keys() - before.keys()        # the lock of a set stays
           if not re.search(r'\.[^/]+\.lock$', path)]
    assert not [path for path in new if not path.startswith('data/noise') or '.tmp' in path]


def test_a_damaged_checkpoint_or_one_of_another_network_or_of_other_images_is_refused(capsys):
    flags = [*TINY, *ONE_STEP, '--resume']
    run(search.main, 'run', *flags)
    Path('run/genotype.json').unlink()
    path, about = Path('run/checkpoint.pt'), Path('run/args.json')
    content = torch.load(path, weights_only=True)
    content['network'].popitem()
    torch.save(content, path)
    for damaged in (path.read_bytes(), path.read_bytes()[:1000]):
        path.write_bytes(damaged)
        one_line(capsys, search.main([*flags, '--save', 'run']), 'checkpoint.pt')
    digest = json.loads(about.read_text())['data_sha256']['images']
    about.write_text(about.read_text().replace(digest, digest[::-1]))
    one_line(capsys, search.main([*flags, '--save', 'run']), 'other images')


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint_only(capsys, monkeypatch):
    original, count = search.weight_step, itertools.count()

    def explode(method, train, sgd):
        if next(count) == 3:                            # the last step of the second epoch
            method.network.classifier.weight.data.fill_(float('nan'))
        return original(method, train, sgd)

    monkeypatch.setattr(search, 'weight_step', explode)
    one_line(capsys, search.main([*TINY, '--save', 'run', '--checkpoint_minutes', '0']), 'step 3')
    content = torch.load('run/checkpoint.pt', weights_only=True)
    assert content['epoch'] == content['step'] == 1
    assert all(v.isfinite().all() for v in content['network'].values())
    # A last step that diverges leaves no weights.
    flags = [*RETRAIN, *ONE_STEP, '--learning_rate', '1e18', '--grad_clip', '1e18', '--save', 'r']
    one_line(capsys, retrain.main(flags), 'not finite')
    assert not any(Path('r', name).exists() for name in ('weights.pt', 'checkpoint.pt'))


def test_a_run_that_another_process_holds_is_refused(capsys):
    flags = [*TINY, *ONE_STEP, '--resume']
    run(search.main, 'run', *flags)
    Path('run/genotype.json').unlink()
    code = 'import fcntl; f = open("run/.lock", "a"); fcntl.lockf(f, fcntl.LOCK_EX); input()'
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE) as holder:
        while not Path('/proc/locks').read_text().count(f' {holder.pid} '):
            time.sleep(0.01)
        one_line(capsys, search.main([*flags, '--save', 'run']), 'another process')
    run(search.main, 'run', *flags)


def test_a_full_disk_is_one_line_and_keeps_what_was_there(capsys, monkeypatch):
    run(search.main, 'run', *TINY, *ONE_STEP)
    Path('run/genotype.json').unlink()
    kept = Path('run/checkpoint.pt').read_bytes()
    full = OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', Mock(side_effect=full))
    flags = ['--kind', 'noise', '--out', 'n', *NOISE[2:]]
    one_line(capsys, generate_data.main(flags), 'No space')
    one_line(capsys, search.main([*TINY, *ONE_STEP, '--save', 'run', '--resume']), 'No space')
    assert not Path('n').exists() and Path('run/checkpoint.pt').read_bytes() == kept
    assert not [path for path in files() if '.tmp' in path]


def test_evaluate_refuses_torchrun(capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    one_line(capsys, evaluate.main(['run']), 'without torchrun')


def test_a_gpu_that_is_not_there_is_one_line_and_none_at_all_is_the_cpu(capsys, monkeypatch):
    if not torch.cuda.is_available():
        assert generate_data.choose_device(5).type == 'cpu'
        assert '--gpu 5' in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    one_line(capsys, search.main([*TINY, '--gpu', '2']), '--gpu 2')


def test_too_little_memory_is_one_line(capsys):
    def main(argv=None):
        raise argv

    for error in (torch.OutOfMemoryError('Tried to allocate'), MemoryError()):
        one_line(capsys, generate_data.one_line_errors(main)(error), '--batch_size')
