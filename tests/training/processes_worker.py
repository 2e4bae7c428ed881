"""One of the processes of a test: runs the jobs of a file one after another, each with a process group of its own.

    python -m tests.training.processes_worker JOBS RANK SIZE

A job is `name`, `settings` (of the run), `port` (where the processes meet), and what happens to it: `signals`, by rank
the number of its own step and the signal that arrives in it; `loses`, samples that cannot be read; `copy`, a folder to
copy the run to when it has ended. How it ended is written to `NAME-outcome-RANK.json` beside the output folder.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from sd_memguard.config import make_train_config
from sd_memguard.data.samples import SampleError, Samples
from sd_memguard.errors import UserError
from sd_memguard.training import trainer as loop
from sd_memguard.training.failures import NonFiniteError

take_step, draw_noise, read_image = loop.Trainer.step, loop.NoiseSampler.sample, Samples.keyed_image


def run_job(job: dict, rank: int, size: int) -> dict:
    """Return how the run ended, with what was counted on the way."""
    seen = {"noise": [], "sent": {}}
    os.environ |= {"MASTER_PORT": str(job["port"]), "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    signals, number, trainers = job.get("signals", {}), [0], []

    def step(trainer, *args):
        number[0] += 1
        trainers[:] = [trainer]
        if signals.get(str(rank), [None])[0] == number[0]:
            signal.raise_signal(signals[str(rank)][1])
        return take_step(trainer, *args)

    def draw(noise_sampler, addresses, *args, **options):
        timesteps, noise, input_noise = draw_noise(noise_sampler, addresses, *args, **options)
        seen["noise"] += [float(one.flatten()[0]) for one in noise]
        return timesteps, noise, input_noise

    def image(samples, sample_id):
        if sample_id in job.get("loses", []) and trainers:
            raise SampleError(f"sample {sample_id} is gone")
        return read_image(samples, sample_id)

    loop.Trainer.step, loop.NoiseSampler.sample, Samples.keyed_image = step, draw, image
    try:
        result = loop.train(make_train_config(**job["settings"]))
    except (UserError, NonFiniteError) as error:
        return {**seen, "error": str(error)}
    except SystemExit as ended:
        return {**seen, "exit": ended.code}
    except BaseException:  # also what other processes do to this one
        return {**seen, "error": traceback.format_exc()}
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    exchange = trainers[0].ranks.exchange if trainers else None
    sent = dict(exchange.sent) if exchange else {}
    return {**seen, "sent": sent, "steps": number[0], "global_step": result.global_step}


def main(jobs_file: str, rank: int, size: int) -> None:
    """Run the jobs."""
    torch.set_num_threads(1)
    for job in json.loads(Path(jobs_file).read_text()):
        outcome = run_job(job, rank, size)
        folder = Path(job["settings"]["output_dir"])
        (folder.parent / f"{job['name']}-outcome-{rank}.json").write_text(json.dumps(outcome))
        if "copy" in job and rank == 0:
            shutil.copytree(folder, job["copy"])


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
