"""What a step costs, in the budget's unit.  Read it with plumbing/budget.py."""
import dataclasses
import itertools

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import BertForMaskedLM
from step import Arm


def price(arm, unit):
    """Of a step of the arm's phase, in a budget's unit."""
    c = arm.config
    return (c.batch_size * sum(flops_of(arm, arm.number)) if unit == "flops" else
            c.batch_size * c.seq_len if unit == "tokens" else 1)


def flops_of(arm, phase):
    """(of the student, of the teacher): flops_per_block of an arm's phase, counted once."""
    if phase not in arm.counted:
        arm.counted[phase] = flops_per_block(
            arm.config, arm.student.config, arm.teacher and arm.teacher.config, phase)
    return arm.counted[phase]


def flops_per_block(config, student, teacher=None, phase=0):
    """(of the student, of the teacher): the matmul FLOPs that one block of the last length, or as many
    shorter ones, cost in training, from two BertConfigs, in one phase.

    torch's own counter over the real step on the meta device (1 multiply-add = 2 FLOP), losses included.  It
    is what --budget-flops spends, the same on every machine."""
    some, teachers = next(n for n in itertools.count(1) if n * config.phases[phase].times % 1 == 0), []
    with torch.device("meta"):
        arm = Arm(dataclasses.replace(config, batch_size=some, micro_batch=some, bf16=False, compile=False),
                  BertForMaskedLM(student),
                  BertForMaskedLM(teacher) if teacher and config.needs_teacher else None, phase=phase)
        with FlopCounterMode(display=False) as counted:
            arm.forward(*arm.dummy(), mark=lambda stage: teachers.append(counted.get_total_flops()))[0].backward()
        found = (counted.get_total_flops() - sum(teachers)) // some, sum(teachers) // some
        if muon := arm.make_muon():
            with FlopCounterMode(display=False) as of_update:
                muon.step()
            found = found[0] + of_update.get_total_flops() / config.batch_size, found[1]
    return found
