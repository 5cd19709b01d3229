"""Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022).

    python pd.py                                  # handwritten digits, 256 -> 1 steps, on a CPU
    python pd.py --dataset cifar10                # the same on CIFAR-10, preferably on a GPU
    python pd.py --sample runs/digits/student-1.pt --num 64 --out grid.png

Read it from top to bottom. Parts 1 to 5 are the paper: tensors of any shape, and no files.
Parts 6 to 12 are the engineering: settings, a UNet, data, training, evaluation, runs. The
command line enters at `main`, which calls `start`, then `start_run`, which makes a `Run`.
Sections, equations and algorithms are numbered as in arXiv:2202.00512.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import glob
import importlib.util
import inspect
import itertools
import json
import math
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from tqdm import tqdm

# ---- 1. Schedule: what is z_t? ---------------------------------------------------------------
# A noisy image is z_t = α_t x + σ_t ε with ε ~ N(0, I). The time t runs from 0 (data) to 1
# (noise) while (α_t, σ_t) walks a quarter of the unit circle: α² + σ² = 1. This is the
# variance-preserving cosine schedule (Sections 2 and 4). In the paper it ends at α = 0. Here, as
# in the authors' release, it stops short of both ends: the log-SNR stays in [-20, 20], so that
# nothing is divided by zero.

FIRST_ANGLE = math.atan(math.exp(-10))  # at t = 0; at t = 1 the angle is π/2 - FIRST_ANGLE

def alpha_sigma(t):
    """(α_t, σ_t), each of t's shape: cosine and sine of an angle linear in t. Section 4.

    t: float or (B,) tensor in [0, 1]. A float gives float64 scalars, which take on the type of
    the tensor that they multiply.
    """
    if not torch.is_tensor(t):
        t = torch.tensor(t, dtype=torch.float64)
    span = math.pi / 2 - 2 * FIRST_ANGLE
    # The cosine of the angle at t is the sine of the angle at 1 - t. In float32 the sine keeps
    # the digits of an α that is almost 0.
    alpha = torch.sin(FIRST_ANGLE + span * (1 - t))
    sigma = torch.sin(FIRST_ANGLE + span * t)
    return alpha, sigma

def log_snr(t):
    """λ_t = log(α_t² / σ_t²), of t's shape: 20 at t = 0, falling to -20 at t = 1. Section 2."""
    alpha, sigma = alpha_sigma(t)
    return 2 * torch.log(alpha / sigma)

def alpha_sigma_for(z, t):
    """(α_t, σ_t) shaped to multiply z: (B,) becomes (B, 1, ..., 1), scalars stay."""
    alpha, sigma = alpha_sigma(t)
    if alpha.ndim == 0:
        return alpha, sigma
    shape = [-1] + [1] * (z.ndim - 1)
    return alpha.reshape(shape), sigma.reshape(shape)

# ---- 2. Parameterizations: what does the network predict? ------------------------------------
# Because z_t = α x + σ ε, ε follows from z_t and x. So in exact arithmetic it does not matter
# whether the network predicts x, ε or v. In practice it decides how the network's errors are
# amplified: the x̂ of an ε-network carries σ/α times its error, and that factor is e^10 at
# t = 1, the only time that a one-step student sees (Section 4).

PARAMS = ("v", "eps", "x", "both")

def to_x_eps(out, z, t, param):
    """(x̂, ε̂), each (B, *dims), from the raw output of the network. Section 4.

    out: (B, *dims), for "both" (B, 2C, ...); z: (B, *dims); t: float or (B,).
    Raises ValueError for an unknown param.
    """
    alpha, sigma = alpha_sigma_for(z, t)
    if param == "v":  # v = α ε - σ x is the velocity of z on the circle (Appendix D)
        return alpha * z - sigma * out, sigma * z + alpha * out
    if param == "eps":
        return (z - sigma * out) / alpha, out
    if param == "x":
        return out, (z - alpha * out) / sigma
    if param == "both":  # x̂ comes mostly from x_out at high noise, from eps_out at low
        x_out, eps_out = out.chunk(2, dim=1)
        x_hat = sigma**2 * x_out + alpha * (z - sigma * eps_out)
        eps_hat = alpha**2 * eps_out + sigma * (z - alpha * x_out)  # = (z - α x̂) / σ
        return x_hat, eps_hat
    raise ValueError(f"param must be one of {', '.join(PARAMS)}, not {param!r}")

class Denoiser(nn.Module):
    """denoiser(z, t) -> (x̂, ε̂), from any network net(z, t) that takes t as a (B,) tensor.

    Sampling and distillation need only a callable like it, which may be a formula instead of a
    network. Training needs a Denoiser, or another nn.Module.
    """

    def __init__(self, net, param="v"):
        super().__init__()
        self.net = net
        self.param = param

    def forward(self, z, t):
        if torch.is_tensor(t):
            times = t.to(z).expand(len(z)).contiguous()
        else:
            times = z.new_full((len(z),), t)
        return to_x_eps(self.net(z, times), z, t, self.param)

# ---- 3. Loss weights: which error counts how much? -------------------------------------------
# Every loss is w(λ_t) ‖x - x̂‖². Because ε - ε̂ = -(α/σ)(x - x̂), the usual ‖ε - ε̂‖² has
# w = α²/σ² = SNR (Equation 9). At t = 1 that is e^-20, and a one-step student would learn
# nothing. The first two weightings below, the paper's, keep w ≥ 1.

WEIGHTINGS = {
    "truncated": lambda snr: snr.clamp(min=1),  # the larger of ‖x - x̂‖² and ‖ε - ε̂‖²
    "snr+1": lambda snr: snr + 1,  # ‖v - v̂‖², their sum
    "snr": lambda snr: snr,  # ‖ε - ε̂‖²
    "constant": lambda snr: torch.ones_like(snr),  # ‖x - x̂‖²
}

def loss_weight(t, weighting):
    """w(λ_t), of t's shape. Section 4. Raises ValueError for an unknown weighting."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, not {weighting!r}")
    snr = torch.exp(log_snr(t))
    return WEIGHTINGS[weighting](snr)

def weighted_loss(model, x_target, z, t, weighting):
    """(B,): w(λ_t) times the mean squared x-error of each example. Equation 2.

    x_target, z: (B, *dims); the target is x for a teacher and x̃ for a student.
    """
    x_hat, _ = model(z, t)
    error = (x_target - x_hat).square().reshape(len(z), -1).mean(1)
    return loss_weight(t, weighting) * error

# ---- 4. Sampling: how do predictions become an image? ----------------------------------------
# The probability-flow ODE (Equation 6) takes the noise away: dz = x̂ dα + ε̂ dσ.
# DDIM is its Euler step (Appendix B): hold x̂ and ε̂, move α and σ. The ancestral sampler does
# not solve the ODE: it adds new noise in each step, as if x̂ were exact (Section 2).

SAMPLERS = ("ddim", "ancestral")

def ddim_step(x_hat, eps_hat, s):
    """z_s = α_s x̂ + σ_s ε̂, (B, *dims): the same x̂ and ε̂, with less noise. Equation 7."""
    alpha, sigma = alpha_sigma_for(x_hat, s)
    return alpha * x_hat + sigma * eps_hat

def ancestral_step(x_hat, z, t, s, variance_interpolation=1.0):
    """A draw of z_s, (B, *dims), with the mean of q(z_s | z_t = z, x = x̂). Equations 3 to 5.

    variance_interpolation: 0 takes the variance of q, the lower bound for a reverse step; 1
    takes the upper bound, with σ_t for σ_s. Between them the logarithm is interpolated.
    """
    alpha_t, sigma_t = alpha_sigma_for(z, t)
    alpha_s, sigma_s = alpha_sigma_for(z, s)
    ratio = (alpha_t / sigma_t * sigma_s / alpha_s) ** 2  # e^(λ_t - λ_s), below 1
    mean = ratio * (alpha_s / alpha_t) * z + (1 - ratio) * alpha_s * x_hat
    sigma = sigma_s ** (1 - variance_interpolation) * sigma_t**variance_interpolation
    std = (1 - ratio).sqrt() * sigma
    return mean + std * torch.randn_like(z)

@torch.no_grad()
def sample(model, z, steps, sampler="ddim", clip=False, variance_interpolation=1.0):
    """x, (B, *dims), from noise z: visits t = 1, 1 - 1/N, ..., 0, where N = steps. Section 2.

    clip: limit x̂ to the range of images, [-1, 1]; variance_interpolation: see ancestral_step.
    Raises ValueError for an unknown sampler or fewer than 1 step.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    for i in range(steps, 0, -1):
        t = i / steps
        s = (i - 1) / steps
        x_hat, eps_hat = model(z, t)
        if clip:
            # ε̂ has to follow, so that z = α x̂ + σ ε̂ still holds.
            x_hat, eps_hat = to_x_eps(x_hat.clamp(-1, 1), z, t, "x")
        # The last step is always DDIM: at t = 0 there is no noise to add.
        if sampler == "ddim" or s == 0:
            z = ddim_step(x_hat, eps_hat, s)
        else:
            z = ancestral_step(x_hat, z, t, s, variance_interpolation)
    return z

# ---- 5. Distillation: what does the student learn? -------------------------------------------
# One step of the student should end where two of the teacher end. Algorithm 2 solves for x̃:
#     α_s x̃ + σ_s (z_t - α_t x̃) / σ_t = z_s
#     x̃ = (z_s - (σ_s/σ_t) z_t) / (α_s - (σ_s/σ_t) α_t)
# Divided by σ, a DDIM step reads z_s/σ_s = z_t/σ_t + (α_s/σ_s - α_t/σ_t) x̂. So steps simply
# add up: x̃ = Σ w_i x̂_i / Σ w_i, where w_i is how much α/σ grows in the teacher's i-th step.
# The code uses this mean: at N = 4096 its float32 error is 4.9e-7, and that of the formula
# above 1.5e-3. x̃ depends only on z_t and the teacher, so a student's loss can reach zero, while
# a teacher's cannot. And x̃ is sharp where the step ends near the data, because there the
# teacher's prediction has settled on one image.

@torch.no_grad()
def distill_target(teacher, z, t, s, substeps=2):
    """x̃, (B, *dims): the x̂ with which one DDIM step from t to s ends where `substeps` steps of
    the teacher end. Algorithm 2.

    t, s: floats or (B,) tensors with s < t. Raises ValueError for fewer than 1 substep.
    """
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, not {substeps}")

    def alpha_over_sigma(time):
        alpha, sigma = alpha_sigma_for(z, time)
        return alpha / sigma

    times = [(t * (substeps - i) + s * i) / substeps for i in range(substeps + 1)]
    weighted_sum = torch.zeros_like(z)
    for start, end in itertools.pairwise(times):
        x_hat, eps_hat = teacher(z, start)
        weighted_sum += (alpha_over_sigma(end) - alpha_over_sigma(start)) * x_hat
        z = ddim_step(x_hat, eps_hat, end)
    return weighted_sum / (alpha_over_sigma(s) - alpha_over_sigma(t))

def sample_times(num, device, steps=None):
    """(num,) times to train at, in (0, 1]: one in each of `num` equal parts, evenly spaced.

    With steps = N, t is rounded up to one of 1/N, 2/N, ..., 1, the only times that the sampler
    of a student visits (Algorithm 2).
    """
    offset = torch.rand(1, device=device)  # the same for all parts
    parts = torch.arange(num, device=device) / num
    t = 1 - (parts + offset) % 1
    if steps is None:
        return t
    return torch.ceil(t * steps) / steps

def training_loss(model, x, eps, t, weighting, teacher=None, steps=None, substeps=2):
    """The mean loss of a batch: Algorithm 1, or, with a teacher, Algorithm 2 for N = steps.

    x, eps: (B, *dims); t: (B,), from sample_times.
    """
    alpha, sigma = alpha_sigma_for(x, t)
    z = alpha * x + sigma * eps
    if teacher is None:
        target = x
    else:
        target = distill_target(teacher, z, t, t - 1 / steps, substeps)
    return weighted_loss(model, target, z, t, weighting).mean()

def distill(teacher, steps, final_steps, train_student, substeps=2):
    """Algorithm 2: divide the sampling steps by `substeps` again and again, down to final_steps.

    Yields (steps, student). train_student(student, teacher, steps) trains a student in place.
    """
    while steps >= substeps * final_steps:
        steps = steps // substeps
        student = copy.deepcopy(teacher)  # a student starts as a copy of its teacher
        train_student(student, teacher, steps)
        yield steps, student
        teacher = student  # and becomes the next teacher

# ---- 6. Settings: all that can be chosen -----------------------------------------------------
# Every field is a flag of the command line, its comment is the help, and the docstring of its
# class a heading there. What is not given on the command line comes from the teacher to distill
# (--teacher), from a preset, or from the defaults below, which are those of the digits.

@dataclasses.dataclass
class TeacherSettings:
    """The teacher"""

    seed: int = 0  # another seed gives another run, or with --sample other images
    flip: bool = False  # mirror half of the images
    param: str = "v"  # what the network predicts: v, eps, x or both
    weighting: str = None  # of the x-error: truncated, snr+1, snr (default for eps), constant
    batch_size: int = 64  # images per update, over all processes
    width: int = 32  # channels of the network at its first level
    mults: tuple = (1, 2)  # the width of each level, as a multiple of the first
    blocks: int = 1  # residual blocks per level
    attention: tuple = ()  # levels with attention, by their down-sampling factor: 1, 2, 4, ...
    patch: int = 1  # squares of patch x patch pixels become channels, for speed
    dropout: float = 0.3  # keeps the network from memorizing the images; not for students
    teacher_updates: int = 1500  # optimizer updates
    lr: float = 2e-3  # learning rate
    warmup: int = 100  # updates at the start, in which the learning rate rises
    decay: float = 0.5  # fraction of the updates, at the end, with a falling learning rate
    ema: float = 0.998  # decay rate of the moving average of the weights

@dataclasses.dataclass
class Settings(TeacherSettings):
    """The students, which share the settings above unless said otherwise"""

    stages: int = 8  # number of distillation rounds
    final_steps: int = 1  # sampling steps of the last student
    substeps: int = 2  # steps of the teacher in one step of the student
    student_updates: int = 180  # optimizer updates of a student; twice as many for 1 and 2 steps
    student_lr: float = 6e-4  # learning rate of a student at its start; it falls to 0
    early: float = 0.4  # fraction of updates and learning rate for students of more than 16 steps

    def __post_init__(self):
        self.mults = tuple(self.mults)
        self.attention = tuple(self.attention)
        if self.weighting is None:  # ε with truncated SNR diverges (Table 1)
            self.weighting = "snr" if self.param == "eps" else "truncated"
        check_numbers(self)

    @property
    def first_steps(self):
        """Sampling steps of the teacher."""
        return self.final_steps * self.substeps**self.stages

    def plan(self, steps):
        """(name, updates, learning rate) of the model with this many sampling steps."""
        if steps == self.first_steps:
            return "teacher", self.teacher_updates, self.lr
        name, updates, lr = f"student-{steps}", self.student_updates, self.student_lr
        if steps > 16:  # it starts close to its target and needs little
            updates = math.ceil(self.early * updates)
            lr = self.early * lr
        if steps <= 2:  # as in Section 5
            updates = 2 * updates
        return name, updates, lr

@dataclasses.dataclass
class Options:
    """Where and how to compute"""

    out: str = None  # folder of the run; with --sample a .png file or a new folder
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    compile: bool = None  # use torch.compile; by default on cuda, for images larger than 16 pixels
    bfloat16: bool = None  # compute in bfloat16; by default where the hardware is fast at it

    def __post_init__(self):
        check_numbers(self)

@dataclasses.dataclass
class RunOptions(Options):
    """A run"""

    dataset: str = "digits"  # digits, mnist, fashion-mnist, cifar10 or a folder of images
    data_dir: str = "data"  # where downloads are kept
    size: int = None  # resize and crop the images to squares of this size
    preset: str = None  # other defaults; without it, those that fit the images and the device
    teacher: str = None  # a teacher.pt to distill, instead of training one
    restart: bool = False  # overwrite the run in --out
    eval_samples: int = 128  # images of each model to evaluate

@dataclasses.dataclass
class SampleOptions(Options):
    """Sampling, instead of a run"""

    sample: str = None  # checkpoint to sample from
    num: int = 64  # how many images
    steps: int = None  # sampling steps; without it, those that the model was made for
    sampler: str = "ddim"  # ddim or ancestral
    clip: bool = False  # limit every x-hat to [-1, 1]

def names_of(*settings_classes):
    """The names of all fields."""
    return [field.name for kind in settings_classes for field in dataclasses.fields(kind)]

def flag_of(name):
    return "--" + name.replace("_", "-")

MINIMUM = {"seed": 0, "stages": 0, "warmup": 0, "substeps": 2, "eval_samples": 2}

def check_numbers(settings):
    """Raises ValueError for a number out of range."""
    for name, value in vars(settings).items():
        smallest = MINIMUM.get(name, 1)
        flag = flag_of(name)
        if type(value) is int and value < smallest:
            raise ValueError(f"{flag} must be at least {smallest}, not {value}")
        if type(value) is tuple and any(number < 1 for number in value):
            raise ValueError(f"all numbers of {flag} must be at least 1, not {value}")
        if type(value) is float and not 0 <= value <= 1:  # NaN, too
            raise ValueError(f"{flag} must be from 0 to 1, not {value}")
        if name in ("lr", "student_lr", "early") and value == 0:
            raise ValueError(f"{flag} must be above 0, or nothing is learned")

SMALL = dict(
    patch=2, mults=(1, 2, 4), attention=(4,), dropout=0.0, warmup=300, ema=0.999,
    early=0.25, eval_samples=256,
)  # fmt: skip
PRESETS = {
    "digits": {},
    "mnist": SMALL | dict(lr=1.5e-3, teacher_updates=3100, student_lr=5e-4, student_updates=290),
    "cifar10-cpu": SMALL | dict(
        flip=True, width=48, lr=1e-3, teacher_updates=4500, student_lr=3e-4, student_updates=650,
    ),
    "cifar10": dict(
        flip=True, width=128, mults=(1, 2, 2, 2), blocks=2, attention=(2, 4), dropout=0.2,
        batch_size=128, teacher_updates=20_000, lr=2e-4, warmup=1000, ema=0.9995,
        student_updates=1500, student_lr=1e-4, eval_samples=2048,
    ),
}  # fmt: skip

# ---- 7. Network ------------------------------------------------------------------------------
# The UNet of DDPM: residual blocks with GroupNorm, scaled and shifted by the embedding of t,
# attention at low resolution, skip connections. It is like the paper's (Section 5), but smaller
# and without BigGAN's resampling inside residual blocks. The last layer of each block starts
# at zero, so that at first a block only passes on its skip connection.

TIME_FEATURES = 128  # numbers that describe t to the network

def time_features(t):
    """(B, 128): cosines and sines of 1000 t at frequencies from 1 to almost 1/10000."""
    half = TIME_FEATURES // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = 1000 * t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)

def conv3x3(width_in, width_out, stride=1):
    return nn.Conv2d(width_in, width_out, 3, stride, padding=1)

def group_norm(width):
    groups = max(1, math.gcd(width, 32) // 4)  # 8 for most widths
    return nn.GroupNorm(groups, width)

def zero_init(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

class Attention(nn.Module):
    """Self-attention with one head: every place looks at every other."""

    def __init__(self, width):
        super().__init__()
        self.norm = group_norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zero_init(nn.Conv2d(width, width, 1))

    def forward(self, h):
        qkv = self.qkv(self.norm(h)).flatten(2).transpose(1, 2)  # (B, H W, 3 C)
        qkv = qkv[:, None]  # the fused kernels want a dimension for the heads
        q, k, v = qkv.chunk(3, dim=3)
        out = F.scaled_dot_product_attention(q, k, v)
        return h + self.out(out.transpose(2, 3).reshape(h.shape))

class ResBlock(nn.Module):
    def __init__(self, width_in, width_out, emb_width, dropout, attend):
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = conv3x3(width_in, width_out)
        self.scale_shift = nn.Linear(emb_width, 2 * width_out)
        self.norm2 = group_norm(width_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(conv3x3(width_out, width_out))
        self.skip = nn.Identity()
        if width_in != width_out:
            self.skip = nn.Conv2d(width_in, width_out, 1)
        self.attention = Attention(width_out) if attend else nn.Identity()

    def forward(self, h, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        out = self.conv1(F.silu(self.norm1(h)))
        out = F.silu(self.norm2(out) * (1 + scale) + shift)
        out = self.conv2(self.dropout(out))
        return self.attention(self.skip(h) + out)

class UNet(nn.Module):
    """net(z, t): (B, channels, H, W) and (B,) -> (B, channels, H, W), for any H and W.

    For param "both" the output has twice the channels.
    Raises ValueError for attention at levels that the network does not have.
    """

    def __init__(self, channels, settings):
        super().__init__()
        width, patch, attention = settings.width, settings.patch, settings.attention
        widths = [width * mult for mult in settings.mults]
        levels = [2**level for level in range(len(widths))]
        if not set(attention) <= set(levels):
            raise ValueError(f"--attention must be some of {levels}, not {attention}")
        channels *= patch**2
        channels_out = 2 * channels if settings.param == "both" else channels
        emb_width = 4 * width
        self.patch = patch
        self.multiple = patch * 2 ** (len(widths) - 1)  # H and W are padded to a multiple of it
        self.use_bfloat16 = False  # see prepare
        self.embed_time = nn.Sequential(
            nn.Linear(TIME_FEATURES, emb_width),
            nn.SiLU(),
            nn.Linear(emb_width, emb_width),
            nn.SiLU(),
        )

        def res_block(width_in, width_out, attend):
            return ResBlock(width_in, width_out, emb_width, settings.dropout, attend)

        # Down: each level but the first halves the size. All outputs are kept for the way up.
        # From here on, `width` is that of the latest output.
        self.downsample, self.down = nn.ModuleList(), nn.ModuleList()
        kept = []  # the widths of what is kept
        for level, level_width in enumerate(widths):
            if level == 0:
                self.downsample.append(conv3x3(channels, width))
            else:
                self.downsample.append(conv3x3(width, width, stride=2))
            kept.append(width)
            blocks = nn.ModuleList()
            for _ in range(settings.blocks):
                blocks.append(res_block(width, level_width, 2**level in attention))
                width = level_width
                kept.append(width)
            self.down.append(blocks)

        # The middle has attention if any level has.
        self.middle = nn.ModuleList(
            [res_block(width, width, bool(attention)), res_block(width, width, False)]
        )

        # Up: each block takes the last of the outputs that are still kept.
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = nn.ModuleList()
            for _ in range(settings.blocks + 1):
                blocks.append(res_block(width + kept.pop(), widths[level], 2**level in attention))
                width = widths[level]
            self.up.append(blocks)
            if level == 0:
                self.upsample.append(nn.Identity())
            else:
                convolution = conv3x3(width, widths[level - 1])
                self.upsample.append(nn.Sequential(nn.Upsample(scale_factor=2), convolution))
                width = widths[level - 1]
        last = zero_init(conv3x3(width, channels_out))
        self.output = nn.Sequential(group_norm(width), nn.SiLU(), last)

    def encode(self, z, t):
        """The first half: (bottleneck, outputs that are kept, embedding of t)."""
        H, W = z.shape[-2:]
        emb = self.embed_time(time_features(t))
        # -W % multiple: how far W is from the next multiple.
        h = F.pad(z, (0, -W % self.multiple, 0, -H % self.multiple))
        h = F.pixel_unshuffle(h, self.patch).contiguous(memory_format=torch.channels_last)
        kept = []
        for downsample, blocks in zip(self.downsample, self.down):
            h = downsample(h)
            kept.append(h)
            for block in blocks:
                h = block(h, emb)
                kept.append(h)
        for block in self.middle:
            h = block(h, emb)
        return h, kept, emb

    def forward(self, z, t):
        H, W = z.shape[-2:]
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            h, kept, emb = self.encode(z, t)
            for blocks, upsample in zip(self.up, self.upsample):
                for block in blocks:
                    h = block(torch.cat([h, kept.pop()], dim=1), emb)
                h = upsample(h)
            out = F.pixel_shuffle(self.output(h), self.patch)[..., :H, :W]
        # Outside, all is float32 and contiguous, so that torch.compile sees one kind of input.
        return out.to(z.dtype).contiguous()

# ---- 8. Data: uint8 images, all of them in memory --------------------------------------------

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
DATASETS = ("digits", *TORCHVISION)

@contextlib.contextmanager
def as_value_error(message):
    """Whatever fails inside becomes a ValueError, which `main` shows as one line."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{message} ({reason[:150]})") from error

def load_dataset(name, data_dir="data", size=None):
    """uint8 images (N, C, H, W), with one channel if all are grey. Add new datasets here.

    name: "digits" (from scikit-learn), "mnist", "fashion-mnist", "cifar10" (downloaded into
    data_dir) or a folder of images. size: resize and crop them to squares of this size.
    Raises ValueError for images that can't be loaded or differ in size.
    """
    if name == "digits":
        from sklearn.datasets import load_digits  # slow to import, like torchvision below

        arrays = (load_digits().images * 255 / 16).round().astype(np.uint8)
        images = [Image.fromarray(array) for array in arrays]
    elif name in TORCHVISION:
        with as_value_error(f"{name} is neither in {data_dir} nor can it be downloaded"):
            import torchvision

            dataset = getattr(torchvision.datasets, TORCHVISION[name])(data_dir, download=True)
        images = (image for image, label in dataset)
    else:
        images = load_folder(name)
    arrays = []
    for image in images:
        if size:
            image = ImageOps.fit(image, (size, size))
        arrays.append(np.asarray(image.convert("RGB")))
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"the images have {len(shapes)} sizes: give --size 32, for example")
    array = np.stack(arrays)
    if (array == array[..., :1]).all():  # red, green and blue are the same: all are grey
        array = array[..., :1]
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()

def load_folder(folder):
    """Yields the images in a folder and its subfolders. Skips hidden ones, follows links."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True))
    paths = [path for path in paths if path.lower().endswith(IMG_EXTENSIONS)]
    files = {os.path.realpath(path): path for path in paths if os.path.isfile(path)}
    if len(files) < 2:
        raise ValueError(
            f"{folder} is neither one of {', '.join(DATASETS)} nor a folder with 2 or more images "
            f"({', '.join(IMG_EXTENSIONS)})"
        )
    damaged = []
    for path in tqdm(files.values(), "loading", leave=False, disable=None):
        try:
            yield open_image(path)
        except Exception as error:  # there are many kinds
            damaged.append(f"{path}: {error}")
    if damaged:
        raise ValueError(f"{len(damaged)} files can't be read, remove them: {'; '.join(damaged)}")

def open_image(path):
    """An RGB image as viewers show it: upright, and on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # integers of 16 or 32 bits, or floats
        raise ValueError("more than 8 bits per channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")

def random_batch(data, num, flip):
    """`num` random examples; uint8 images become floats in [-1, 1]. flip: mirror half."""
    x = data[torch.randint(len(data), (num,), device=data.device)]
    if x.dtype == torch.uint8:
        x = to_float(x)
    if flip:
        mirrored = torch.rand(num, 1, 1, 1, device=x.device) < 0.5
        x = torch.where(mirrored, x.flip(-1), x)
    return x

def to_float(images):
    """uint8 from 0 to 255 -> float32 from -1 to 1."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """Floats from -1 to 1 -> uint8 from 0 to 255."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()

# ---- 9. Training: one loop for the teacher and for every student -----------------------------
# A student differs from a teacher in its target, its times t and its learning rate, and it has
# neither dropout nor a moving average of its weights.
# All random numbers of an update follow from (seed, steps, update). So a stopped run continues
# as if it had not been stopped, and several processes can split one batch: each draws all of
# it and takes its part. (The masks of dropout are the exception.)

# Purposes for set_seed. In training it is a student's steps, at most 8192, or 0 for a teacher.
WEIGHTS, SAMPLES, REAL_IMAGES = 1_000_000, 1_000_001, 1_000_002

def set_seed(seed, purpose, number):
    """Seed torch from three integers."""
    sequence = np.random.SeedSequence((seed, purpose, number))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

@contextlib.contextmanager
def keep_random_state():
    """Seeds that are set inside do not change what the caller draws afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def learning_rate(lr, update, updates, settings, is_student):
    """The learning rate of an update, counted from 0."""
    remaining = 1 - update / updates
    if is_student:  # falls from the start (Section 5)
        return lr * remaining
    if update < settings.warmup:  # rises
        return lr * (update + 1) / settings.warmup
    if remaining < settings.decay:  # falls at the end
        return lr * remaining / settings.decay
    return lr

class Training:
    """A model in training, with all that is needed to continue after a stop."""

    def __init__(self, model, is_student):
        self.model = model
        # A student's learning rate falls to 0, so its last weights need no averaging.
        self.average = model if is_student else copy.deepcopy(model)
        self.optimizer = torch.optim.Adam(model.parameters(), fused=True)
        self.updates = 0  # done so far
        self.seconds = 0.0
        self.log = []

    def state_dict(self):
        state = {"updates": self.updates, "seconds": self.seconds, "log": self.log}
        for name in ("model", "average", "optimizer"):
            state[name] = getattr(self, name).state_dict()
        return state

    def load_state_dict(self, state):
        for name in ("updates", "seconds", "log"):
            setattr(self, name, state[name])
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    @torch.no_grad()
    def update_average(self, ema):
        # The decay rate rises from 0.1 to ema, so that the average soon forgets the start.
        rate = min(ema, (self.updates + 1) / (self.updates + 10))
        averages = list(self.average.parameters())
        torch._foreach_lerp_(averages, list(self.model.parameters()), 1 - rate)

    def finish(self):
        """The average is the result. What only training needs is dropped, to keep files small."""
        self.model.load_state_dict(self.average.state_dict())
        self.average = self.model
        self.optimizer.zero_grad()
        self.optimizer.state.clear()
        self.model.eval()

def training_loop(training, data, updates, lr, settings, teacher=None, steps=None):
    """Algorithm 1, or with a teacher Algorithm 2. Yields (loss, gradient norm) per update."""
    model, optimizer = training.model, training.optimizer
    is_student = teacher is not None
    model.train(not is_student)  # students need no dropout (Section 5)
    if world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    while training.updates < updates:
        set_seed(settings.seed, steps or 0, training.updates)
        x = random_batch(data, settings.batch_size, settings.flip)
        eps = torch.randn_like(x)
        t = sample_times(len(x), x.device, steps)
        x, eps, t = (whole[rank() :: world_size()] for whole in (x, eps, t))
        loss = training_loss(
            model, x, eps, t, settings.weighting, teacher, steps, settings.substeps
        )
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(lr, training.updates, updates, settings, is_student)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if not is_student:
            training.update_average(settings.ema)
        training.updates += 1
        yield loss.detach(), grad_norm
    training.finish()

def train(model, data, updates, lr=1e-3, teacher=None, steps=None, **settings):
    """Train a Denoiser in place on data (N, *dims), as training_loop does. Returns all losses.

    settings: fields of Settings, such as batch_size. Raises ValueError for numbers out of range.
    """
    param = getattr(model, "param", "v")  # decides on the default weighting
    settings = Settings(**{"param": param, "lr": lr, "teacher_updates": updates} | settings)
    training = Training(model, is_student=teacher is not None)
    loop = training_loop(training, data, updates, lr, settings, teacher, steps)
    with keep_random_state():
        return [loss.item() for loss, grad_norm in loop]

# ---- 10. Evaluation: did it work? ------------------------------------------------------------
# Fréchet distances are computed on features of the run's own teacher. Nothing is downloaded, and
# the samplers of one run can be compared, but the numbers are not the published FID.

CHUNK = 128  # images sampled together

def generate(model, num, shape, steps, sampler="ddim", seed=0, device="cpu", clip=False):
    """uint8 images (num, *shape) on the CPU. A seed means the same noise for every model.

    The first images are the same for every num, because whole chunks are drawn.
    """
    chunks = []
    with keep_random_state():
        for start in tqdm(range(0, num, CHUNK), f"{steps} steps", leave=False, disable=None):
            set_seed(seed, SAMPLES, start // CHUNK)
            z = torch.randn(CHUNK, *shape, device=device)
            x = sample(model, z, steps, sampler, clip)
            chunks.append(to_uint8(x).cpu())
    return torch.cat(chunks)[:num]

@torch.no_grad()
def features(net, images, device="cpu", t=0.1):
    """(N, D): a UNet's bottleneck, averaged over space, for uint8 images scaled by α_t."""
    alpha, _ = alpha_sigma(t)
    chunks = []
    for chunk in images.split(CHUNK):
        z = alpha * to_float(chunk.to(device))
        bottleneck, *_ = net.encode(z, z.new_full((len(z),), t))
        chunks.append(bottleneck.mean((2, 3)).cpu())
    return torch.cat(chunks)

def frechet_distance(a, b):
    """|μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of two sets of features, (N, D) each."""
    a = torch.as_tensor(a).cpu().double()
    b = torch.as_tensor(b).cpu().double()
    cov_a = torch.atleast_2d(torch.cov(a.T))
    cov_b = torch.atleast_2d(torch.cov(b.T))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^½
    # (C_a C_b)^½ and the root of this symmetric product have the same trace.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def evaluate(models, images, num, seed=0, device="cpu"):
    """Compare {steps: model}, teacher first: (rows of a table, {label: uint8 images})."""
    first = max(models)
    teacher = models[first]
    with keep_random_state():
        set_seed(seed, REAL_IMAGES, 0)
        # Up to ten times as many real images, for better statistics.
        some = torch.randperm(len(images))[: 10 * num].to(images.device)
    real = features(teacher.net, images[some], device)
    drawn = {}

    def draw_and_measure(label, model, steps, sampler="ddim"):
        drawn[label] = generate(model, num, images.shape[1:], steps, sampler, seed, device)
        return frechet_distance(real, features(teacher.net, drawn[label], device))

    rows = []
    print("Fréchet distances in the teacher's features; drift: RMSE to the teacher's images")
    for steps, model in models.items():
        ddim = draw_and_measure(f"teacher, {steps}", teacher, steps)
        if model is teacher:
            label, distilled = f"teacher, {steps}", ddim
        else:
            label = f"student, {steps}"
            distilled = draw_and_measure(label, model, steps)
        change = to_float(drawn[label]) - to_float(drawn[f"teacher, {first}"])
        row = {"steps": steps, "distilled": distilled, "ddim": ddim}
        if steps <= 16:  # many steps are slow, and few are what matters
            row["ancestral"] = draw_and_measure("ancestral", teacher, steps, "ancestral")
        row["drift"] = change.square().mean().sqrt().item()
        rows.append(row)
        print("  ".join(f"{name} {value:<8.4g}" for name, value in row.items()), flush=True)
    return rows, drawn

def image_grid(images, columns):
    """uint8 array (H, W, 3): images (N, C, H, W) in rows, enlarged smoothly below 16 pixels."""
    if max(images.shape[2:]) < 16:
        images = F.interpolate(images.float(), scale_factor=8, mode="bicubic")
        images = images.clamp(0, 255).round().byte()
    images = F.pad(images.expand(-1, 3, -1, -1), (1, 1, 1, 1), value=255)
    missing = images.new_full((-len(images) % columns, *images.shape[1:]), 255)  # white
    rows = torch.cat([images, missing]).permute(0, 2, 3, 1).split(columns)
    return np.vstack([np.hstack(row) for row in rows])

def plot_samples(drawn, steps, columns=10):
    """samples.png: the teacher and the last three students, the same noise in every row."""
    first, *others = steps
    few = others[-3:]
    labels = [f"teacher, {n}" for n in (first, *few)] + [f"student, {n}" for n in few]
    rows = torch.cat([drawn[label][:columns] for label in labels])
    grid = image_grid(rows, len(rows) // len(labels))
    axes = Figure(figsize=(columns, len(labels))).add_subplot(xticks=[])
    centres = (np.arange(len(labels)) + 0.5) * len(grid) / len(labels)
    axes.set_yticks(centres, labels)
    axes.set_title("model, sampling steps; the same noise in every row")
    axes.imshow(grid)
    return axes.figure

def plot_steps(rows):
    """steps.png: distance against sampling steps."""
    axes = Figure(dpi=130).add_subplot(xlabel="sampling steps", ylabel="Fréchet distance")
    steps = [row["steps"] for row in rows]
    for column in ("ddim", "ancestral", "distilled"):
        distances = [row.get(column, math.nan) for row in rows]  # NaN is not drawn
        axes.loglog(steps, distances, "o-", label=column)
    axes.set_xticks(steps, steps)
    axes.legend()
    return axes.figure

# ---- 11. A run: its models and its files -----------------------------------------------------
# A checkpoint holds a model, its moving average, its optimizer, the updates and seconds so far,
# the log, the sampling steps, and the identity of the run (settings and images). The same
# command loads what is there and trains what is missing. Other settings are refused, except new
# students for a finished teacher.

LOG_EVERY = 100  # updates
SAVE_EVERY = 60  # seconds

@contextlib.contextmanager
def whole_file(path):
    """A file to write, which appears at `path` only when it is complete."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # on the disk before it replaces the old one
    os.replace(part, path)

def load_checkpoint(path):
    """(what the file holds, its Settings). Raises ValueError for any other file."""
    with as_value_error(f"{path} cannot be read as a checkpoint of pd.py"):
        checkpoint = torch.load(path, "cpu", weights_only=True)
        for name in ("shape", "images", "steps", "updates", "average"):
            checkpoint[name]  # fails if it is missing
        return checkpoint, Settings(**checkpoint["settings"])

def build(settings, channels):
    """The Denoiser that the settings describe, with its first weights, in eval mode."""
    with keep_random_state():
        set_seed(settings.seed, WEIGHTS, 0)
        net = UNet(channels, settings)
    return Denoiser(net, settings.param).to(memory_format=torch.channels_last).eval()

def load_model(path):
    """(Denoiser, checkpoint) from a file of a run; while a teacher trains, its average.

    checkpoint["steps"] are the sampling steps that the model was made for.
    Raises ValueError for any other file.
    """
    checkpoint, settings = load_checkpoint(path)
    with as_value_error(f"{path} does not fit the network of this pd.py"):
        model = build(settings, checkpoint["shape"][0])
        model.load_state_dict(checkpoint["average"])
    return model, checkpoint

def prepare(model, options, shape):
    """Move a Denoiser for images of this shape to the device, and make it fast there."""
    is_large = max(shape[1:]) > 16  # smaller images gain nothing
    bfloat16 = options.bfloat16
    if bfloat16 is None:
        bfloat16 = is_large and is_fast_in_bfloat16(options.device)
    compile_net = options.compile
    if compile_net is None:
        has_triton = importlib.util.find_spec("triton") is not None
        compile_net = is_large and has_triton and options.device == "cuda"
    model.net.use_bfloat16 = bfloat16
    if compile_net:
        model.net.compile()
    return model.to(options.device)

def is_fast_in_bfloat16(device):
    """Whether the hardware computes in bfloat16 natively."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "cpu" and has_instructions

def is_finished_teacher(checkpoint, settings):
    """Whether a checkpoint with these settings holds a fully trained teacher."""
    is_teacher = checkpoint["steps"] == settings.first_steps
    return is_teacher and checkpoint["updates"] == settings.teacher_updates

class Run:
    """A teacher and its students, trained in turn, each kept in a file of the folder `out`."""

    def __init__(self, settings, options, images, out):
        self.settings = settings
        self.options = options
        self.data = images.to(options.device)
        self.out = out
        self.teacher = build(settings, images.shape[1])
        self.trainings = {}  # by the names of the models
        # The images count, not the name of their folder.
        self.identity = {
            "settings": vars(settings),
            "shape": list(images.shape[1:]),
            "images": f"{len(images)} with checksum {zlib.crc32(images.numpy()):x}",
        }

    def check(self, path, name, advice):
        """Raises ValueError if a checkpoint holds another model, or one of other settings."""
        checkpoint, settings = load_checkpoint(path)
        its_name, *_ = settings.plan(checkpoint["steps"])
        if its_name != name:
            raise ValueError(f"{path} holds the {its_name}, not the {name}: {advice}")
        names = names_of(Settings)
        if is_finished_teacher(checkpoint, settings):
            names = names_of(TeacherSettings)  # it may get other students
        found = vars(settings) | checkpoint
        ours = vars(self.settings) | self.identity
        different = [
            f"{name} {found[name]}, not {ours[name]}"
            for name in (*names, "shape", "images")
            if found[name] != ours[name]
        ]
        if different:
            raise ValueError(f"{path} was made with {'; '.join(different)}: {advice}")

    def open_folder(self):
        """Refuse a folder that holds another run, and put the given teacher in."""
        path = self.out / "teacher.pt"
        restart = self.options.restart
        given = self.options.teacher
        if given:
            self.check(given, "teacher", "leave out these flags, and use the same images")
            content = Path(given).read_bytes()
        if restart:
            (self.out / "results.json").unlink(missing_ok=True)
        for old in [*self.out.glob("teacher.pt"), *self.out.glob("student-*.pt")]:
            if not restart:
                advice = "use these settings, another --out, or --restart to overwrite"
                self.check(old, old.stem, advice)
            elif not (given and old == path):  # it is replaced below
                old.unlink()
        self.out.mkdir(parents=True, exist_ok=True)
        if given and (restart or not path.exists()):
            with whole_file(path) as file:
                file.write(content)
        if given and path.read_bytes() != content:
            raise ValueError(f"{path} is another teacher: use another --out, or --restart")

    def train_all(self):
        """Train the teacher, then distill it. Returns {steps: model}."""
        first = self.settings.first_steps
        self.train_model(self.teacher, None, first)
        final, substeps = self.settings.final_steps, self.settings.substeps
        models = {first: self.teacher}
        for steps, student in distill(self.teacher, first, final, self.train_model, substeps):
            models[steps] = student
        return models

    def train_model(self, model, teacher, steps):
        """Train a model, or do what is left to do for it, and keep it in its file."""
        settings = self.settings
        name, updates, lr = settings.plan(steps)
        path = self.out / f"{name}.pt"
        prepare(model, self.options, self.identity["shape"])
        training = Training(model, teacher is not None)
        self.trainings[name] = training
        if path.exists():  # continue a stopped run
            checkpoint, _ = load_checkpoint(path)
            training.load_state_dict(checkpoint)
        was_finished = training.updates == updates

        student_steps = None if teacher is None else steps  # a teacher learns at all t
        loop = training_loop(training, self.data, updates, lr, settings, teacher, student_steps)
        silent = True if rank() > 0 else None  # None: shown only in a terminal
        bar = tqdm(loop, name, updates, initial=training.updates, leave=False, disable=silent)
        last_log = last_save = time.monotonic()
        recent = []  # losses and gradient norms since the last row of the log
        for loss, grad_norm in bar:
            recent.append(torch.stack([loss, grad_norm]))
            finished = training.updates == updates
            if training.updates % LOG_EVERY and not finished:
                continue
            # Only here does the CPU wait for the GPU, once in a while.
            loss, grad_norm = torch.stack(recent).mean(0).tolist()
            recent = []
            if not math.isfinite(loss + grad_norm):
                raise ValueError(
                    f"the loss of {name} is not finite at update {training.updates}: "
                    "lower --lr or --student-lr, and give another --out or --restart"
                )
            training.log.append(f"{name},{training.updates},{loss:.6g},{grad_norm:.6g}")
            bar.set_postfix(loss=loss)
            now = time.monotonic()
            training.seconds += now - last_log
            last_log = now
            if now - last_save > SAVE_EVERY and not finished:
                self.save(path, training, steps)
                last_save = now
        if not was_finished:
            self.save(path, training, steps)

    def save(self, path, training, steps):
        if rank() > 0:
            return
        (self.out / "results.json").unlink(missing_ok=True)  # it described older models
        rows = [row for logged in self.trainings.values() for row in logged.log]
        with whole_file(self.out / "log.csv") as file:
            file.write("\n".join(["model,update,loss,grad_norm", *rows, ""]).encode())
        with whole_file(path) as file:  # last, so that a stop leaves nothing out of the log
            torch.save(training.state_dict() | self.identity | {"steps": steps}, file)
        tqdm.write(f"{path.stem:12}{training.updates:8,} updates, {training.seconds:.0f} s")

    def write_results(self, models):
        """Evaluate the models, and write the table and the figures."""
        num = self.options.eval_samples
        path = self.out / "results.json"
        if path.exists():
            old = json.loads(path.read_text())
            measured = [row["steps"] for row in old["rows"]]
            if measured == list(models) and old["eval_samples"] == num:
                return  # finished before
        rows, drawn = evaluate(models, self.data, num, self.settings.seed, self.options.device)
        for row, training in zip(rows, self.trainings.values()):
            row["updates"] = training.updates
            row["seconds"] = training.seconds
        figures = {"samples.png": plot_samples(drawn, list(models)), "steps.png": plot_steps(rows)}
        for name, figure in figures.items():
            with whole_file(self.out / name) as file:
                figure.savefig(file, bbox_inches="tight")
        results = self.identity | {"eval_samples": num, "rows": rows}
        with whole_file(path) as file:  # the last file: it says that the run is finished
            file.write(json.dumps(results, indent=1).encode())

def sample_to_file(options, seed):
    """--sample: images from a checkpoint, into a grid or a new folder."""
    from torchvision.utils import save_image

    out = Path(options.out or "grid.png")
    is_grid = out.suffix.lower() == ".png"
    if out.suffix and not is_grid:
        raise ValueError(f"--out must end in .png, or be a new folder without a suffix, not {out}")
    if out.is_dir() or (out.exists() and not is_grid):
        raise ValueError(f"{out} already exists: give a .png file or a new folder")
    model, checkpoint = load_model(options.sample)
    out.parent.mkdir(parents=True, exist_ok=True)
    shape, own_steps = checkpoint["shape"], checkpoint["steps"]
    settings = Settings(**checkpoint["settings"])
    prepare(model, options, shape)
    steps = options.steps or own_steps
    is_student = own_steps < settings.first_steps
    if is_student and steps != own_steps:
        print(f"note: this student was trained for --steps {own_steps}; others are worse")
    images = generate(
        model, options.num, shape, steps, options.sampler, seed, options.device, options.clip
    )
    if is_grid:
        columns = math.ceil(len(images) ** 0.5)
        with whole_file(out) as file:
            Image.fromarray(image_grid(images, columns)).save(file, "png")
    else:  # the folder appears only when it is complete
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            part = Path(folder) / out.name
            part.mkdir()
            for i, image in enumerate(tqdm(images, "writing", leave=False, disable=None)):
                save_image(image / 255, part / f"{i:06}.png")
            os.replace(part, out)
    print(f"{len(images)} images with {steps} steps each: {out}")

# ---- 12. The command line --------------------------------------------------------------------

def field_comments(settings_class):
    """{field: the comment behind it}, from the source code of a class."""
    comments = {}
    for line in inspect.getsource(settings_class).splitlines():
        field, _, comment = line.partition("  # ")
        comments[field.split(":")[0].strip()] = comment
    return comments

def make_parser():
    parser = argparse.ArgumentParser(
        "pd.py",
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__.split("\n")[0],
        epilog="Defaults in brackets are those of the digits; other images have other presets.",
        argument_default=argparse.SUPPRESS,  # only what is given appears in the result
        allow_abbrev=False,
    )
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    choices = {
        "param": PARAMS,
        "weighting": WEIGHTINGS,
        "preset": PRESETS,
        "device": devices,
        "sampler": SAMPLERS,
    }
    for settings_class in (RunOptions, Options, TeacherSettings, Settings, SampleOptions):
        group = parser.add_argument_group(settings_class.__doc__)
        comments = field_comments(settings_class)
        for name, kind in settings_class.__annotations__.items():
            default = getattr(settings_class, name)
            flag, text = flag_of(name), f"{comments[name]} [{default}]"
            if kind is bool:
                group.add_argument(flag, help=text, action=argparse.BooleanOptionalAction)
            elif kind is tuple:
                group.add_argument(flag, help=text, type=int, nargs="+" if default else "*")
            else:
                group.add_argument(flag, help=text, type=kind, choices=choices.get(name))
    return parser

def chosen(settings_class, given):
    """The settings of this class: what is given, and defaults. ValueError if out of range."""
    names = names_of(settings_class)
    return settings_class(**{name: given[name] for name in names if name in given})

def preset_for(images, device):
    """The name of the preset that fits."""
    _, channels, H, W = images.shape
    if max(H, W) <= 16:
        return "digits"
    if max(H, W) <= 32 and channels == 1:
        return "mnist"
    return "cifar10-cpu" if device == "cpu" else "cifar10"

def check_flags(given):
    """Raises ValueError for a flag that would be ignored."""
    if "sample" in given:
        word = "with"
        allowed = ["seed", *names_of(SampleOptions)]
    else:
        word = "without"
        allowed = names_of(RunOptions, Settings)
    for name in given:
        if name not in allowed:
            raise ValueError(f"{flag_of(name)} cannot be used {word} --sample")
    if "teacher" in given and "preset" in given:
        raise ValueError("--preset cannot be used with --teacher, which brings its settings")

def settings_of_teacher(path):
    """The settings of a finished teacher, as a dict. ValueError for another file."""
    checkpoint, settings = load_checkpoint(path)
    if not is_finished_teacher(checkpoint, settings):
        raise ValueError(f"{path} is not a teacher that is fully trained")
    return vars(settings)

def join_processes(device):
    """If torchrun has started several processes, let them train together."""
    if dist.is_torchelastic_launched():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if device == "cuda" else "gloo"
        patience = datetime.timedelta(days=1)  # a download may take long
        dist.init_process_group(backend, timeout=patience)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # the first process prints for all

def start(given):
    """Do what the given flags say."""
    check_flags(given)
    if "teacher" in given:
        given = settings_of_teacher(given["teacher"]) | given
    settings = chosen(Settings, given)  # finds wrong numbers before anything is downloaded
    if settings.stages > 13 or settings.first_steps > 8192:  # 2^13 = 8192
        raise ValueError("--final-steps * --substeps ** --stages must be at most 8192")
    join_processes(given.get("device", Options.device))
    if "sample" not in given:
        start_run(given)
    elif rank() == 0:
        sample_to_file(chosen(SampleOptions, given), settings.seed)

def start_run(given):
    """A run with the given settings; the rest comes from a preset or the defaults."""
    options = chosen(RunOptions, given)
    folder = Path(options.dataset).resolve()
    out = Path(options.out or f"runs/{folder.name}")
    if options.dataset not in DATASETS and out.resolve().is_relative_to(folder):
        raise ValueError(f"--out {out} must not be in the folder of the images")
    if rank() > 0:
        dist.barrier()  # the first process downloads the data and prepares the folder
    images = load_dataset(options.dataset, options.data_dir, options.size)
    preset = options.preset or preset_for(images, options.device)
    given = PRESETS[preset] | given  # what is given goes before the preset
    settings = chosen(Settings, given)
    options = chosen(RunOptions, given)
    if settings.batch_size % world_size():
        raise ValueError(f"--batch-size must be a multiple of the {world_size()} processes")
    run = Run(settings, options, images, out)
    if rank() == 0:
        run.open_folder()
        if world_size() > 1:
            dist.barrier()
    steps = f"{settings.first_steps} -> {settings.final_steps} steps"
    print(f"{len(images):,} images, {steps}, in {out}")
    models = run.train_all()
    if rank() == 0:
        run.write_results(models)
    print(f"{out} is finished: results.json, samples.png, steps.png")

def main(argv=None):
    """The command line. Wrong input ends with status 2 and one line, Ctrl-C with 130."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    try:
        start(given)
    except KeyboardInterrupt:
        hint = "the same command, without --restart, continues from the last save"
        if "sample" in given:
            hint = "nothing was written"
        print(f"stopped: {hint}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # not torch's way to say that memory is short
        parser.error("out of memory: use smaller images, a smaller batch or a smaller network")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal without é shows ?
    main()
