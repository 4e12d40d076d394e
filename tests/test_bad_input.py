"""Bad input: one clear line that names the thing, exit status 2, nothing left behind."""
import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from test_data import fake_cifar, folder_of_images
from test_scripts import RETRAIN, TINY, run_search

import evaluate
import generate_data
import genotypes
import retrain
import search

SCRIPTS = {'generate': generate_data.main, 'search': search.main, 'retrain': retrain.main,
           'evaluate': evaluate.main}


def written(size=8):
    generate_data.write_noise('set', 40, 4, size, 0)


def cut(path, keep):
    """Truncate a file to its first `keep` bytes."""
    Path(path).write_bytes(Path(path).read_bytes()[:keep])


def setup(name):
    if name == 'set':
        written()
    elif name == 'small set':
        written(4)
    elif name == 'cifar':
        fake_cifar()
    elif name == 'own':
        folder_of_images('own')
    elif name == 'run':
        run_search('run', '--max_steps', '1')
    elif name.startswith('cut '):
        _, kind, file, keep = name.split()
        setup(kind)
        cut(file, int(keep))
    elif name.startswith('put '):
        _, kind, file, content = name.split(' ', 3)
        setup(kind)
        Path(file).write_bytes(content.encode('latin-1'))
    elif name.startswith('meta '):              # changes of meta.json, as JSON
        setup('set')
        meta = json.loads(Path('set/meta.json').read_text())
        Path('set/meta.json').write_text(json.dumps({**meta, **json.loads(name[5:])}))
    elif name == 'unfinished':
        setup('run')
        Path('run/genotype.json').unlink()
    elif name == 'counters':
        setup('unfinished')
        content = torch.load('run/checkpoint.pt', weights_only=True)
        torch.save({**content, 'epoch': None}, 'run/checkpoint.pt')
    elif name.startswith('drop '):
        _, kind, file = name.split()
        setup(kind)
        Path(file).unlink()
    elif name == 'empty class':
        setup('own')
        Path('own/empty').mkdir()
    elif name == 'broken image':
        setup('own')
        Path('own/cat/1.png').write_bytes(b'no image')
    elif name == 'wrong pickle':
        setup('cifar')
        Path('data/cifar-10-batches-py/data_batch_3').write_bytes(b'\x80\x02K\x05.')
    elif name == 'other classes':
        folder_of_images('own/train')
        folder_of_images('own/val', ('cat', 'cow'))
    elif name == 'no classes':
        Path('own').mkdir()
    elif name == 'other method':
        setup('run')
        content = torch.load('run/checkpoint.pt', weights_only=True)
        content['network'].pop('alphas.normal')
        torch.save(content, 'run/checkpoint.pt')
        Path('run/genotype.json').unlink()
    elif name == 'truncated checkpoint':
        setup('run')
        Path('run/genotype.json').unlink()
        cut('run/checkpoint.pt', 1000)
    elif name == 'changed labels':
        setup('set')
        import numpy as np
        np.save('set/labels.npy', np.load('set/labels.npy')[::-1])
    elif name:
        Path('genotype.json').write_text(name)


def broken(**changes):
    return json.dumps({**genotypes.DARTS_V2._asdict(), **changes})


N = TINY[:0] + TINY[4:]                         # without the sizes of noise
GOOD = genotypes.DARTS_V2.normal
TABLE = [
    # set-up, script, arguments, what the line must name
    ('', 'generate', '--kind noise --out x --num_images 5', 'num_images'),
    ('', 'generate', '--kind noise --out x --image_size 0', 'image_size'),
    ('', 'generate', '--kind noise --out x --seed -1', 'seed'),
    ('', 'generate', '--kind nose --out x', 'nose'),
    ('', 'generate', '--out x', '--kind'),
    ('', 'generate', '--kind noise --out x --label_mode permute', 'permute'),
    ('', 'generate', '--kind noise --out x --label_noise 0.5', 'label_noise'),
    ('', 'generate', '--kind random_labels --out x --label_noise 1.5', 'label_noise'),
    ('', 'generate', '--kind random_labels --out x --label_noise nan', 'label_noise'),
    ('', 'generate', '--kind random_labels --out x --source nowhere', 'nowhere'),
    ('', 'generate', '--kind random_labels --out x', 'cifar10'),
    ('set', 'generate', '--kind noise --out set', 'set exists'),
    ('own', 'generate', '--kind noise --out .', 'exists'),
    ('{', 'generate', '--kind noise --out genotype.json/x', 'genotype.json'),
    ('{', 'search', '--save genotype.json/x', 'genotype.json'),
    ('{', 'search', '--save genotype.json', 'genotype.json'),
    ('run', 'evaluate', 'run --csv nowhere/t.csv', 'nowhere'),
    ('cut set set/images.npy 300', 'search', '--data set', 'images.npy'),
    ('cut set set/images.npy 3000', 'search', '--data set', 'images.npy'),
    ('cut set set/labels.npy 60', 'search', '--data set', 'labels.npy'),
    ('cut set set/labels.npy 0', 'search', '--data set', 'labels.npy'),
    ('cut set set/meta.json 60', 'search', '--data set', 'meta.json'),
    ('drop set set/images.npy', 'search', '--data set', 'images.npy'),
    ('drop set set/labels.npy', 'search', '--data set', 'labels.npy'),
    ('changed labels', 'search', '--data set', 'labels.npy'),
    ('set', 'search', '--data set --image_size 16', 'take --image_size 8'),
    ('small set', 'search', '--data set', '4 px'),
    ('cut cifar data/cifar-10-batches-py/data_batch_4 500', 'search', '--data cifar10',
     'data_batch_4'),
    ('cut cifar data/cifar-10-batches-py/data_batch_4 0', 'search', '--data cifar10',
     'data_batch_4'),
    ('drop cifar data/cifar-10-batches-py/data_batch_5', 'search', '--data cifar10',
     'data_batch_5'),
    ('drop cifar data/cifar-10-batches-py/batches.meta', 'search', '--data cifar10',
     'batches.meta'),
    ('wrong pickle', 'search', '--data cifar10', 'data_batch_3'),
    ('', 'search', '--data cifar100', 'cifar-100-python'),
    ('empty class', 'search', '--data own --image_size 8', 'empty'),
    ('broken image', 'search', '--data own --image_size 8', '1.png'),
    ('other classes', 'retrain', '--arch DARTS_V2 --data own --image_size 8', 'cow'),
    ('no classes', 'search', '--data own', 'own'),
    ('', 'search', '--data nosuch', 'nosuch'),
    ('', 'search', '--method nosuch', 'nosuch'),
    ('', 'search', '--nosuch 3', 'nosuch'),
    ('', 'search', '--batch_size 0', 'batch_size'),
    ('', 'search', '--batch_size 40 --num_images 64', 'batch_size'),
    ('', 'search', '--learning_rate nan', 'learning_rate'),
    ('', 'search', '--learning_rate -1', 'learning_rate'),
    ('', 'search', '--learning_rate fast', 'fast'),
    ('', 'search', '--momentum 1', 'momentum'),
    ('', 'search', '--space nb201 --momentum 0', '--no-nesterov'),
    ('', 'generate', '--kind noise --out x --num_images 40 --probe', '--probe'),
    ('', 'generate', '--kind noise --out x --like cifar100 --source own', '--source'),
    ('', 'search', '--train_portion 1', 'train_portion'),
    ('', 'search', '--layers 2', 'layers'),
    ('', 'search', '--image_size 4', 'image_size'),
    ('', 'search', '--partial 3', 'partial'),
    ('', 'search', '--steps_per_epoch 9999 --num_images 64', 'steps_per_epoch'),
    ('', 'search', '--num_images 8 --num_classes 9', 'num_images'),
    ('run', 'search', '--save run', '--resume'),
    ('run', 'search', '--save run --resume --layers 4', '--layers'),
    ('other method', 'search', '--save run --resume --max_steps 1', 'checkpoint.pt'),
    ('truncated checkpoint', 'search', '--save run --resume --max_steps 1', 'checkpoint.pt'),
    ('own', 'search', '--save own', 'own'),
    ('', 'search', '--learning_rate 1e30 --grad_clip 1e30 --save nan', 'not finite'),
    ('', 'retrain', '', '--arch'),
    ('', 'retrain', '--arch DARTS_V3 --data noise', 'DARTS_V3'),
    ('', 'retrain', '--arch DARTS_V2 --data noise --image_size 8 --auxiliary', 'auxiliary'),
    ('', 'retrain', '--arch DARTS_V2 --data noise --drop_path_prob 1', 'drop_path_prob'),
    ('', 'retrain', '--arch DARTS_V2 --data noise --learning_rate 1e30 --grad_clip 1e30 '
     '--save nan', 'not finite'),
    ('{', 'retrain', '--arch genotype.json --data noise', 'genotype.json'),
    ('[]', 'retrain', '--arch genotype.json --data noise', 'genotype.json'),
    ('{}', 'retrain', '--arch genotype.json --data noise', 'normal'),
    (broken(normal=GOOD[:7]), 'retrain', '--arch genotype.json --data noise', '7 operations'),
    (broken(normal=(('conv_9x9', 0), *GOOD[1:])), 'retrain', '--arch genotype.json --data noise',
     'conv_9x9'),
    (broken(reduce=(('skip_connect', 2), *GOOD[1:])), 'retrain',
     '--arch genotype.json --data noise', 'no input 2'),
    (broken(normal=(('skip_connect', 0), ('sep_conv_3x3', 0), *GOOD[2:])), 'retrain',
     '--arch genotype.json --data noise', 'twice'),
    (broken(normal_concat=[2, 9]), 'retrain', '--arch genotype.json --data noise', 'concat'),
    ('', 'evaluate', 'norun', 'norun'),
    ('', 'evaluate', '', 'nothing to evaluate'),
    ('', 'evaluate', '--cost', '--arch'),
    ('', 'evaluate', '--arch DARTS_V3 --cost', 'DARTS_V3'),
    ('own', 'evaluate', 'own', 'args.json'),
    ('drop run run/genotype.json', 'evaluate', 'run', 'genotype.json'),
    ('cut run run/args.json 50', 'evaluate', 'run', 'args.json'),
    ('put run run/args.json {}', 'evaluate', 'run', 'args.json'),
    ('put run run/args.json [3]', 'search', '--save run --resume', 'args.json'),
    ('put run run/log.jsonl {}\n', 'evaluate', 'run', 'log.jsonl'),
    ('put run run/log.jsonl \xff\xfe', 'evaluate', 'run', 'log.jsonl'),
    ('counters', 'search', '--save run --resume --max_steps 1', 'checkpoint.pt'),
    ('meta {"std": [0, 1, 1]}', 'search', '--data set', 'meta.json'),
    ('meta {"mean": [null, 1, 1]}', 'search', '--data set', 'meta.json'),
    ('meta {"kind": "nose"}', 'search', '--data set', 'meta.json'),
    ('meta {"classes": ["a"]}', 'search', '--data set', 'labels.npy'),
    ('meta {"classes": 4}', 'search', '--data set', 'meta.json'),
    ('', 'search', '--data noise --label_noise 0.5', 'label_noise'),
    ('cifar', 'search', '--data cifar10 --num_classes 3', 'num_classes'),
    ('cifar', 'generate', '--kind random_labels --out x --multilabel', 'multilabel'),
    ('', 'generate', '--kind noise --out x --seed 99999999999999999999', 'seed'),
    ('', 'search', '--method random --data nonsense', 'nonsense'),
    ('', 'search', '--learning_rate_min 1', 'learning_rate_min'),
    ('', 'search', '--method pcdarts --init_channels 8 --epochs 2 --frozen_epochs 2',
     'frozen_epochs'),
    ('', 'retrain', '--arch DARTS_V2 --data noise --max_steps 0', 'max_steps'),
    ('own', 'generate', '--kind noise --out own --force --num_images 40', 'own'),
    ('own', 'generate', '--kind random_labels --source own --out own/x', 'own/x'),
    ('own', 'generate', '--kind generated --generator train --source own --out own/x', 'own/x'),
    ('set', 'generate', '--kind random_labels --source set --out set --force', 'set'),
    ('run', 'evaluate', 'run --arch DARTS_V2 --cost', 'run'),
    ('', 'evaluate', '--arch DARTS_V2 --cost --csv t.csv', '--csv'),
    ('run', 'evaluate', 'run --arch DARTS_V2', '--arch'),
    ('run', 'evaluate', 'run --num_classes 5', '--num_classes'),
    ('run', 'evaluate', 'run --csv .', '--csv'),
    ('', 'search', '--image_size 32 --stem imagenet --init_channels 1', '--init_channels'),
    ('', 'search', '--epochs 1' + 400 * '0', '--epochs'),
    ('', 'retrain', '--arch DARTS_V2 --data noise --auxiliary_weight 1', '--auxiliary_weight'),
    ('', 'retrain', '--arch DARTS_V2 --data noise --cutout_length 4', '--cutout_length'),
    ('', 'retrain', '--arch DARTS_V2 --data noise --max_multiply_adds 1e9 --init_channels 6',
     '--init_channels'),
]


def files():
    return {str(p): p.stat().st_size for p in Path('.').rglob('*') if p.is_file()}


def check(capsys, status, needle):
    err = [line for line in capsys.readouterr().err.splitlines()
           if not line.startswith(('warning', 'making', 'no CUDA'))]
    assert status == 2 and len(err) == 1, err
    assert re.match(r'\w+\.py: error: ', err[0]) and needle in err[0] and len(err[0]) < 400, err


@pytest.mark.parametrize('state, script, arguments, needle', TABLE,
                         ids=[f'{k}-{row[1]}-{row[3]}' for k, row in enumerate(TABLE)])
def test_one_line_and_nothing_left(state, script, arguments, needle, capsys):
    setup(state)
    before = files()
    flags = arguments.split()
    if script in ('search', 'retrain') and flags:
        base = {'search': TINY, 'retrain': RETRAIN}[script]
        given = {flag for flag in flags if flag.startswith('--')} | (
            {'--image_size', '--num_images'} if '--data' in flags and 'noise' not in flags
            else set())
        flags += [f for pair in zip(base[::2], base[1::2]) if pair[0] not in given for f in pair]
    capsys.readouterr()
    check(capsys, SCRIPTS[script](flags), needle)
    after = files()
    assert all(after.get(path) == size for path, size in before.items())
    new = {path for path in after if path not in before and not path.startswith('data/noise')}
    assert needle == 'not finite' or not new, new
    assert not [p for p in after if '.tmp' in p]


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(capsys):
    flags = [*TINY, '--epochs', '2', '--checkpoint_minutes', '0', '--save', 'run']
    original = search.weight_step

    def explode(network, train, sgd, args):
        if sgd.param_groups[0]['lr'] < 0.02:                            # in the second epoch
            with torch.no_grad():
                network.classifier.weight.fill_(float('nan'))
        return original(network, train, sgd, args)

    search.weight_step = explode
    try:
        check(capsys, search.main(flags), 'step 2')
    finally:
        search.weight_step = original
    content = torch.load('run/checkpoint.pt', weights_only=True)
    assert content['epoch'] == 1 and content['step'] == 0
    assert all(v.isfinite().all() for v in content['network'].values())


@pytest.mark.parametrize('code, needle', [(errno.ENOSPC, 'space'), (errno.EROFS, 'folder')])
def test_full_disk_and_read_only_folder(code, needle, capsys, monkeypatch):
    def fail(path):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, 'fsync', fail)
    check(capsys, generate_data.main(['--kind', 'noise', '--out', 'n', '--num_images', '20',
                                      '--image_size', '8']), needle)
    assert not list(Path('.').iterdir())


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    check(capsys, search.main([*TINY[:-2], '--gpu', '2']), '--gpu 2')


def test_no_cuda_runs_on_the_cpu_and_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip('this machine has CUDA')
    assert evaluate.choose_device(5).type == 'cpu'
    assert '--gpu 5' in capsys.readouterr().err
    assert evaluate.choose_device(-1).type == 'cpu' and not capsys.readouterr().err


def test_a_run_that_another_process_holds(capsys):
    run_search('run', '--max_steps', '1')
    Path('run/genotype.json').unlink()
    with evaluate.Running(Path('run'), torch.device('cpu')):
        check(capsys, search.main([*TINY, '--max_steps', '1', '--save', 'run', '--resume']),
              'another process')
    Path('run/genotype.json').touch()           # that process ended as this one was starting
    with pytest.raises(generate_data.UserError, match='was finished'), \
            evaluate.Running(Path('run'), torch.device('cpu')):
        pass


@pytest.mark.parametrize('error, needle', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried ...'), '--batch_size'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), '--batch_size'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error.'), '--workers 0')])
def test_too_little_memory_is_one_line(error, needle, capsys):
    @generate_data.one_line_errors
    def main(argv=None):
        raise error
    assert main() == 2 and needle in capsys.readouterr().err


def test_a_run_goes_on_on_another_kind_of_device():
    """What Adam and SGD were told to suit a GPU does not come with their state."""
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([weight], foreach=True)
    weight.grad = torch.ones(3)
    adam.step()
    state = adam.state_dict()
    state['param_groups'][0].update(capturable=True, lr=0.5)
    checkpoint = {'adam': state, 'random': [[torch.get_rng_state()]], 'sums': torch.zeros(1)}
    evaluate.load_states(checkpoint, 'c', (), adam=adam)
    assert adam.param_groups[0]['lr'] == 0.5 and not adam.param_groups[0]['capturable']
    adam.step()


def test_a_last_step_that_diverges_leaves_no_weights(capsys):
    flags = [*RETRAIN, '--arch', 'DARTS_V2', '--data', 'noise', '--learning_rate', '1e30',
             '--grad_clip', '1e30', '--epochs', '1', '--steps_per_epoch', '1', '--save', 'r']
    check(capsys, retrain.main(flags), 'not finite')
    assert not any(Path('r', name).exists() for name in ('weights.pt', 'checkpoint.pt'))


def test_a_stopped_writers_leftovers_are_removed():
    run_search('run', '--max_steps', '1')
    Path('run/genotype.json').unlink()
    Path('run/.log.jsonl.123.tmp').write_text('half')
    run_search('run', '--max_steps', '1', '--resume')
    assert not list(Path('run').glob('.*.tmp'))


def test_a_broken_log_of_retrain_is_one_line(capsys):
    flags = [*RETRAIN, '--arch', 'DARTS_V2', '--data', 'noise', '--save', 'r']
    assert retrain.main(flags) == 0
    Path('r/weights.pt').unlink()
    lines = Path('r/log.jsonl').read_text().splitlines()
    Path('r/log.jsonl').write_text(f'{lines[0]}\n{{"epoch": \n')
    saved = torch.load('r/checkpoint.pt', weights_only=True)
    torch.save({**saved, 'epoch': 1}, 'r/checkpoint.pt')
    check(capsys, retrain.main([*flags, '--resume']), 'log.jsonl: line 2')


def test_a_folder_has_one_name():
    Path('a').mkdir()
    parse = search.parse
    assert parse(['--data', 'a/']).save == parse(['--data', 'a']).save
    assert retrain.parse(['--arch', 'DARTS_V2/']).arch == 'DARTS_V2'


def test_retrain_names_a_retrained_network(capsys):
    Path('r').mkdir()
    Path('r/args.json').write_text('{"settings": {"arch": "DARTS_V2"}}')
    check(capsys, retrain.main(['--arch', 'r', '--data', 'noise']), 'retrained network')
