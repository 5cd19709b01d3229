"""pd.py: Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), in one file.

    python pd.py                                   # real handwritten digits, 256 -> 1 steps, on two CPU cores
    python pd.py --dataset cifar10 --stages 8      # the same on CIFAR-10, for a GPU
    python pd.py --sample runs/digits/student-1.pt --num 64 --out grid.png

Read it from top to bottom. Parts 1 to 5 are the paper: tensors of any shape, no devices, files or flags. Parts 6
to 10 are the engineering. Sections, equations and algorithms are numbered as in the paper, arXiv:2202.00512.
"""
import argparse, contextlib, functools, io, itertools, json, math, os, platform, sys, tempfile, textwrap, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ---- 1. Schedule: what is z_t? -----------------------------------------------------------------------------
# A noisy picture: z_t = α_t x + σ_t ε with ε ~ N(0, I). The clock t runs from 0 (data) to 1 (noise) while
# (α_t, σ_t) walks a quarter of the unit circle: α² + σ² = 1, the variance-preserving cosine schedule (Sections
# 2 and 4). It stops just short of both ends: the log-SNR stays in [-20, 20] and nothing is divided by zero.
FIRST_ANGLE = math.atan(math.exp(-10))          # at t = 0; at t = 1 it is arctan(e^10) = π/2 - FIRST_ANGLE

def alpha_sigma(t):
    """(α_t, σ_t), each of t's shape: the cosine and the sine of an angle that is linear in t. Section 4.

    t: float or (B,) tensor in [0, 1]. A float gives float64 scalars; they leave the type of what they multiply.
    """
    if not torch.is_tensor(t):
        t = torch.tensor(t, dtype=torch.float64)
    span = math.pi / 2 - 2 * FIRST_ANGLE
    # cos(angle at t) = sin(angle at 1 - t), and in float32 the sine keeps the digits of an α that is almost 0
    return torch.sin(FIRST_ANGLE + span * (1 - t)), torch.sin(FIRST_ANGLE + span * t)

def log_snr(t):
    """λ_t = log(α_t² / σ_t²), of t's shape: 20 at t = 0, falling to -20 at t = 1. Section 2."""
    alpha, sigma = alpha_sigma(t)
    return 2 * torch.log(alpha / sigma)

def alpha_sigma_for(z, t):
    """(α_t, σ_t) in a shape to multiply z with: (B,) becomes (B, 1, ..., 1), a scalar stays one."""
    return [a.reshape(-1, *[1] * (z.ndim - 1)) if a.ndim else a for a in alpha_sigma(t)]

# ---- 2. Parameterizations: what does the network predict? --------------------------------------------------
# Given z_t, to know x is to know ε, for z_t = α x + σ ε: in exact arithmetic it does not matter which of x, ε or
# v the network predicts. In practice it decides how the network's errors are amplified: the x̂ of an ε-network
# carries σ/α times its error, which is e^10 at t = 1, where a one-step student does all its work (Section 4).
PARAMS = ("v", "eps", "x", "both")

def to_x_eps(out, z, t, param):
    """(x̂, ε̂), each (B, *dims), from the raw output of the network. Section 4.

    out: (B, *dims), for "both" (B, 2C, ...); z: (B, *dims); t: float or (B,). ValueError for an unknown param.
    """
    alpha, sigma = alpha_sigma_for(z, t)
    if param == "v":                            # v = α ε - σ x, the velocity of z on the circle (Appendix D)
        return alpha * z - sigma * out, sigma * z + alpha * out
    if param == "eps":
        return (z - sigma * out) / alpha, out
    if param == "x":
        return out, (z - alpha * out) / sigma
    if param == "both":                         # x̂ is mostly x̃ where there is noise, mostly from ε̃ near the data
        x_out, eps_out = out.chunk(2, dim=1)
        x_hat = sigma**2 * x_out + alpha * (z - sigma * eps_out)
        return x_hat, alpha**2 * eps_out + sigma * (z - alpha * x_out)          # (z - α x̂) / σ, multiplied out
    raise ValueError(f"param must be one of {', '.join(PARAMS)}, not {param!r}")

class Denoiser(nn.Module):
    """denoiser(z, t) -> (x̂, ε̂), from any network net(z, t) that gets t as a (B,) tensor. Section 4.

    All below asks no more of a `model` or a `teacher`: a callable (z, t) -> (x̂, ε̂), trained or in closed form.
    """

    def __init__(self, net, param="v"):
        super().__init__()
        if param not in PARAMS:
            raise ValueError(f"param must be one of {', '.join(PARAMS)}, not {param!r}")
        self.net, self.param = net, param

    def forward(self, z, t):
        clock = t.to(z) if torch.is_tensor(t) else z.new_full((), t)
        return to_x_eps(self.net(z, clock.expand(len(z))), z, t, self.param)

# ---- 3. Loss weights: which error counts how much? ---------------------------------------------------------
# Every loss is w(λ_t) ‖x - x̂‖². Because ε - ε̂ = -(α/σ)(x - x̂), the usual ‖ε - ε̂‖² has w = α²/σ² = SNR (Equation 9).
# At t = 1 that is e^-20: a one-step student would learn nothing. So the paper keeps w from falling below 1.
WEIGHTINGS = {
    "truncated": lambda snr: snr.clamp(min=1),          # max(SNR, 1), the larger of ‖x - x̂‖² and ‖ε - ε̂‖²
    "snr+1": lambda snr: snr + 1,                       # ‖v - v̂‖², their sum
    "snr": lambda snr: snr,                             # ‖ε - ε̂‖²
    "constant": lambda snr: torch.ones_like(snr),       # ‖x - x̂‖²
}

def loss_weight(t, weighting):
    """w(λ_t), of t's shape. Section 4. ValueError for an unknown weighting."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, not {weighting!r}")
    return WEIGHTINGS[weighting](torch.exp(log_snr(t)))

def weighted_loss(model, x_target, z, t, weighting):
    """(B,): w(λ_t) times the mean squared x-error of each example. Equation 2.

    x_target, z: (B, *dims), the target being x for a teacher and x̃ for a student; t: float or (B,).
    """
    x_hat, _ = model(z, t)
    return loss_weight(t, weighting) * (x_target - x_hat).square().reshape(len(z), -1).mean(1)

# ---- 4. Sampling: how do predictions become a picture? -----------------------------------------------------
# The probability-flow ODE takes the noise away. In the plane of α and σ it reads dz = x̂ dα + ε̂ dσ (Equation 6).
# DDIM is its Euler step (Appendix B): hold x̂ and ε̂, move α and σ. Heun takes the mean of x̂ and ε̂ at both ends of
# the step. The ancestral sampler is no ODE: it draws z_s from the posterior that an exact x̂ would give (Section 2).
SAMPLERS = ("ddim", "ancestral", "heun")

def ddim_step(x_hat, eps_hat, s):
    """z_s = α_s x̂ + σ_s ε̂, (B, *dims): the same x̂ and ε̂, with less noise. Equation 7."""
    alpha, sigma = alpha_sigma_for(x_hat, s)
    return alpha * x_hat + sigma * eps_hat

def ancestral_step(x_hat, z, t, s, noise_scale=1.0):
    """A draw of z_s, (B, *dims), from the posterior q(z_s | z_t = z, x = x̂), where s < t. Equations 3 to 5.

    noise_scale in [0, 1] interpolates the log of the variance between its lower (0) and its upper bound (1).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma_for(z, t), alpha_sigma_for(z, s)
    ratio = (alpha_t / sigma_t * sigma_s / alpha_s)**2                          # e^(λ_t - λ_s), below 1
    mean = ratio * (alpha_s / alpha_t) * z + (1 - ratio) * alpha_s * x_hat
    std = (1 - ratio).sqrt() * sigma_s**(1 - noise_scale) * sigma_t**noise_scale
    return mean + std * torch.randn_like(z)

def heun_step(model, x_hat, eps_hat, z, t, s):
    """z_s, (B, *dims): dz = x̂ dα + ε̂ dσ by the trapezoidal rule, with a second call of the model at s."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma_for(z, t), alpha_sigma_for(z, s)
    x_end, eps_end = model(ddim_step(x_hat, eps_hat, s), s)
    return z + (alpha_s - alpha_t) * (x_hat + x_end) / 2 + (sigma_s - sigma_t) * (eps_hat + eps_end) / 2

@torch.no_grad()
def sample(model, z, steps, sampler="ddim", clip=False, noise_scale=1.0):
    """x, (B, *dims), from noise z: visits t = 1, 1 - 1/N, ..., 0, where N = steps. Section 2.

    clip: limit x̂ to [-1, 1] and recompute ε̂; noise_scale: see ancestral_step. Every sampler ends with a DDIM
    step: at t = 0 there is no noise to add and nothing to predict. ValueError for an unknown sampler or steps < 1.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")

    def predict(z, t):
        x_hat, eps_hat = model(z, t)
        return to_x_eps(x_hat.clamp(-1, 1), z, t, "x") if clip else (x_hat, eps_hat)

    for i in range(steps, 0, -1):
        t, s = i / steps, (i - 1) / steps
        x_hat, eps_hat = predict(z, t)
        if sampler == "ddim" or s == 0:
            z = ddim_step(x_hat, eps_hat, s)
        elif sampler == "ancestral":
            z = ancestral_step(x_hat, z, t, s, noise_scale)
        else:
            z = heun_step(predict, x_hat, eps_hat, z, t, s)
    return z

# ---- 5. Distillation: what does the student learn? ---------------------------------------------------------
# One step of the student shall end where two of the teacher end. Algorithm 2 solves this for the x̃ to predict:
#     α_s x̃ + σ_s (z_t - α_t x̃) / σ_t = z_s    =>    x̃ = (z_s - (σ_s/σ_t) z_t) / (α_s - (σ_s/σ_t) α_t)
# Divided by σ, a DDIM step is z_s/σ_s = z_t/σ_t + (α_s/σ_s - α_t/σ_t) x̂. So steps add up, and x̃ is a mean of what
# the teacher predicts on its way, weighted by how α/σ grows: the same x̃ without a difference of almost equal
# numbers. Given z_t, nothing about x̃ is left to chance: a student can reach it, a denoiser only E[x | z_t].
@torch.no_grad()
def distill_target(teacher, z, t, s, substeps=2):
    """x̃, (B, *dims): a DDIM step with it from z_t = z to z_s ends where `substeps` of the teacher do. Algorithm 2.

    t, s: floats or (B,) tensors, s < t. ValueError for substeps < 1.
    """
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, not {substeps}")

    def alpha_over_sigma(t):
        alpha, sigma = alpha_sigma_for(z, t)
        return alpha / sigma

    x_tilde = torch.zeros_like(z)
    times = [(t * (substeps - i) + s * i) / substeps for i in range(substeps + 1)]      # t, then t', then t'' = s
    for start, end in itertools.pairwise(times):
        x_hat, eps_hat = teacher(z, start)
        x_tilde = x_tilde + (alpha_over_sigma(end) - alpha_over_sigma(start)) * x_hat
        z = ddim_step(x_hat, eps_hat, end)
    return x_tilde / (alpha_over_sigma(s) - alpha_over_sigma(t))

# ---- 6. Network --------------------------------------------------------------------------------------------
# The UNet of DDPM and its heirs: residual blocks with GroupNorm that t scales and shifts, self-attention at chosen
# resolutions, skip connections. The last layer of every block and of the network starts at zero, so that a fresh
# v-network says v = 0, that is x̂ = α z. On a GPU it computes in bfloat16; everything around it is float32.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun
EMBEDDING = 128                                                 # numbers that describe t to the network

def time_embedding(t, dim):
    """(B, dim): cosines, then sines of 1000 t at dim / 2 frequencies from 1 down to almost 1/10000; t is (B,)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = 1000 * t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)

conv3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)

def norm(width):
    return nn.GroupNorm(max(1, math.gcd(width, 32) // 4), width)

def zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.heads = width // 64 if width % 64 == 0 else 1
        self.norm, self.qkv = norm(width), nn.Conv2d(width, 3 * width, 1)
        self.out = zero(nn.Conv2d(width, width, 1))

    def forward(self, h):
        B, C, H, W = h.shape
        qkv = self.qkv(self.norm(h)).reshape(B, 3, self.heads, C // self.heads, H * W)
        out = F.scaled_dot_product_attention(*qkv.transpose(-1, -2).unbind(1))          # (B, heads, H W, C / heads)
        return h + self.out(out.transpose(-1, -2).reshape(B, C, H, W))

class ResBlock(nn.Module):
    def __init__(self, width_in, width_out, embedding, dropout, attend):
        super().__init__()
        self.norm1, self.conv1 = norm(width_in), conv3(width_in, width_out)
        self.scale_shift = nn.Linear(embedding, 2 * width_out)
        self.norm2, self.dropout, self.conv2 = norm(width_out), dropout, zero(conv3(width_out, width_out))
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.attention = Attention(width_out) if attend else nn.Identity()

    def forward(self, h, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        out = F.silu(self.norm2(self.conv1(F.silu(self.norm1(h)))) * (1 + scale) + shift)
        if self.training and self.dropout:                      # as the rest: drawn for all processes, then sliced
            noise = torch.empty(WORLD * len(out), *out.shape[1:], device=out.device, memory_format=torch.channels_last)
            out = out * (noise.uniform_().chunk(WORLD)[RANK] >= self.dropout) / (1 - self.dropout)
        return self.attention(self.skip(h) + self.conv2(out))

class UNet(nn.Module):
    """net(z, t): (B, channels, H, W) and (B,) -> (B, out_channels, H, W). The network of Section 5, smaller.

    width: channels at full resolution; mults: their multiple at each halving; blocks: residual blocks a resolution;
    attention: down-sampling factors that attend, and with them the middle; out_channels: default `channels`, twice
    as many for "both". ValueError where H or W is not a multiple of 2^(len(mults) - 1).
    """

    def __init__(self, channels, width, mults=(1, 2), blocks=1, attention=(), dropout=0.0, out_channels=None):
        super().__init__()
        self.multiple, emb, widths = 2 ** (len(mults) - 1), 4 * width, [width]
        self.embed = nn.Sequential(nn.Linear(EMBEDDING, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem, self.down, self.up = conv3(channels, width), nn.ModuleList(), nn.ModuleList()
        for i, mult in enumerate(mults):
            if i > 0:
                self.down.append(conv3(widths[-1], widths[-1], stride=2))
                widths.append(widths[-1])
            for _ in range(blocks):
                self.down.append(ResBlock(widths[-1], width * mult, emb, dropout, 2**i in attention))
                widths.append(width * mult)
        h = widths[-1]
        self.middle = nn.ModuleList(ResBlock(h, h, emb, dropout, attend) for attend in (bool(attention), False))
        for i, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(h + widths.pop(), width * mult, emb, dropout, 2**i in attention))
                h = width * mult
            if i > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv3(h, h)))
        self.head = nn.Sequential(norm(h), nn.SiLU(), zero(conv3(h, out_channels or channels)))

    def forward(self, z, t, bottleneck=False):
        """With `bottleneck` it stops half-way, in float32: (B, C, H / multiple, W / multiple), for `features`."""
        H, W = z.shape[-2:]
        if H % self.multiple or W % self.multiple:
            raise ValueError(f"this network can't halve {W}x{H} pictures: sizes must be multiples of {self.multiple}")
        with torch.autocast(z.device.type, torch.bfloat16, enabled=z.is_cuda and not bottleneck):
            emb = self.embed(time_embedding(t, EMBEDDING))
            h = self.stem(z).contiguous(memory_format=torch.channels_last)
            skips = [h]
            for layer in self.down:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
                skips.append(h)
            for layer in self.middle:
                h = layer(h, emb)
            if bottleneck:
                return h
            for layer in self.up:
                block = isinstance(layer, ResBlock)
                h = layer(torch.cat([h, skips.pop()], dim=1), emb) if block else layer(h)
            return self.head(h).to(z.dtype)

# ---- 7. Data: uint8 pictures, all of them in memory --------------------------------------------------------
progress = functools.partial(tqdm, leave=False, disable=True if RANK else None)         # None: only on a terminal
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".pgm", ".ppm", ".tif", ".tiff", ".webp")

@contextlib.contextmanager
def blaming(what, remedy):
    """Make one ValueError of whatever fails in here: what is wrong (why): what would be right."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({textwrap.shorten(f'{type(error).__name__}: {error}', 150)}): {remedy}") from error

def load_dataset(name, data_dir="data", size=None):
    """(images, labels): uint8 (N, C, H, W) and int64 (N,). ValueError for what can't be loaded.

    name: "digits" (8x8, from scikit-learn), "mnist", "fashion-mnist", "cifar10" (downloaded to data_dir) or a folder
    of pictures, flat or one subfolder a class. size: resize the shorter side to it and crop the centre.
    """
    if name == "digits":
        from sklearn.datasets import load_digits
        digits = load_digits()                                  # grey levels from 0 to 16
        pairs = zip((digits.images * 255 / 16).round().astype(np.uint8), digits.target)
    elif name in TORCHVISION:
        with blaming(f"{name} could not be loaded", "repeat the command with a network, or put the files of "
                     f"torchvision's {TORCHVISION[name]} into {data_dir}"):
            import torchvision                                  # here, for the digits do without
            pairs = getattr(torchvision.datasets, TORCHVISION[name])(data_dir, download=True)
    else:
        pairs = load_folder(Path(name))
    images, labels = [], []
    for picture, label in progress(pairs, "reading pictures"):
        if size:
            picture = ImageOps.fit(Image.fromarray(np.asarray(picture)), (size, size))
        images.append(np.atleast_3d(picture))
        labels.append(label)
        (h, w, _), (H, W, _) = images[0].shape, images[-1].shape
        if not h == w == H == W:
            raise ValueError(f"the pictures are not all squares of one size ({w}x{h}, {W}x{H}): give --size")
    channels = max(image.shape[2] for image in images)          # one picture in colour makes all of them RGB
    images = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)

def load_folder(folder):
    """(picture, label) of every picture in a folder, the label being the number of its subfolder."""
    if not folder.is_dir():
        raise ValueError(f"no data set {str(folder)!r}: give digits, {', '.join(TORCHVISION)} or a folder of pictures")
    files = sorted(file for file in folder.rglob("[!.]*") if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise ValueError(f"{folder} holds {len(files)} pictures: at least 2 are needed ({' '.join(SUFFIXES)})")
    folders = sorted({file.parent for file in files})
    for file in files:
        with blaming(f"{file} is not a readable picture", "mend or remove it"), Image.open(file) as picture:
            if picture.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel")
            picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        yield picture, folders.index(file.parent)

# ---- 8. Training: one loop for the teacher and for every student -------------------------------------------
# Algorithm 2 is Algorithm 1 but for two things: t is drawn from the student's discrete clock, for its sampler will
# only ever visit t = 1/N, ..., 1, and x̃ takes the place of x. All random numbers of an update are a function of
# (seed, stage, update), so that a stopped run continues as if it had never stopped; and each process draws the
# whole batch and takes its slice, so that two processes train the model that one trains.

def barrier():
    if WORLD > 1:
        dist.barrier()

def set_seed(*key):
    """Seed torch by whole numbers: (seed, stage, update)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

def draw(data, num, flip):
    """`num` random examples; uint8 pictures become floats in [-1, 1], mirrored half the time if `flip`."""
    x = data[torch.randint(len(data), (num,), device=data.device)]
    if x.dtype == torch.uint8:
        x = x.float() / 127.5 - 1
    return torch.where(torch.rand(num, 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x) if flip else x

def train(model, data, updates, *, teacher=None, steps=None, substeps=2, weighting="truncated", batch_size=128,
          lr=1e-3, warmup=0, ema=0.999, flip=False, seed=0, stage=0, every=100, resume=None, report=None,
          title="model"):
    """Train `model`, a Denoiser, in place on data (N, *dims): Algorithm 1, or with a teacher Algorithm 2 for `steps`.

    A teacher-to-be warms up for `warmup` updates and ends as its exponential moving average. A student's learning
    rate falls linearly to zero and it ends as it is. Every `every` updates and at the end, the mean loss and gradient
    norm are read and report(state) is called; a state given as `resume` continues there. Returns what was read, a
    list of dictionaries. ValueError where that is not finite.
    """
    params = list(model.parameters())
    optimizer = torch.optim.Adam(params, lr, fused=True)
    weights = [p.detach() for p in params]                      # the same numbers, outside of autograd
    average = [w.clone() for w in weights] if teacher is None else []
    read, rows = 0, []
    if resume:
        read, rows, average = resume["update"], resume["rows"], resume["average"]
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
    model.train(teacher is None)                                # dropout is for Algorithm 1 only
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    totals = torch.zeros(2, device=data.device)

    for update in progress(range(read, updates), title, updates, initial=read):
        set_seed(seed, stage, update)
        x = draw(data, batch_size, flip)
        eps = torch.randn_like(x)
        if teacher is None:                                     # Algorithm 1: t is continuous
            t = torch.rand(batch_size, device=x.device)
        else:                                                   # Algorithm 2: t is one of 1/N, 2/N, ..., 1
            t = torch.randint(1, steps + 1, (batch_size,), device=x.device) / steps
        x, eps, t = (a.chunk(WORLD)[RANK] for a in (x, eps, t))
        alpha, sigma = alpha_sigma_for(x, t)
        z = alpha * x + sigma * eps
        if teacher is not None:                                 # Algorithm 2: x̃ instead of x
            with torch.inference_mode():
                x = distill_target(teacher, z, t, t - 1 / steps, substeps)
        loss = weighted_loss(net, x, z, t, weighting).mean()

        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(params, 1.0)
        rate = min(1, (update + 1) / max(1, warmup)) if teacher is None else 1 - update / updates
        optimizer.param_groups[0]["lr"] = lr * rate
        optimizer.step()
        if average:                                             # a short memory at first, then `ema`
            torch._foreach_lerp_(average, weights, 1 - min(ema, (update + 1) / (update + 10)))
        totals += torch.stack([loss.detach(), grad_norm])

        if (update + 1) % every == 0 or update + 1 == updates:  # the only place where the host waits for the device
            if WORLD > 1:
                dist.all_reduce(totals)
            loss, grad_norm = (totals / (update + 1 - read) / WORLD).tolist()
            if not math.isfinite(loss + grad_norm):
                raise ValueError(f"the loss of {title} is not finite any more (update {update + 1}): give a lower "
                                 "learning rate and --restart; the last good checkpoint is kept")
            totals.zero_()
            read = update + 1
            rows.append({"model": title, "update": read, "loss": loss, "grad_norm": grad_norm, "lr": lr * rate})
            if report:
                report({"update": read, "rows": rows, "average": average, "model": model.state_dict(),
                        "optimizer": optimizer.state_dict()})
    for p, a in zip(weights, average):
        p.copy_(a)
    model.eval()
    return rows

# ---- 9. Evaluation: did it work? ---------------------------------------------------------------------------
# The Fréchet distance here compares features of the run's own teacher: it needs no download, fits any data set and
# is one ruler for all samplers of a run. It is not the published FID, which is what `--fid` adds.
CHUNK = 256                                                     # pictures sampled together
INIT, EVALUATION = 10**6, 10**6 + 1                             # for set_seed: "stages" that are no stages

def generate(model, num, shape, steps, sampler="ddim", seed=0, device="cpu", title="sampling"):
    """uint8 pictures (num, *shape) on the CPU; one seed gives every model and sampler the same noise."""
    images = torch.zeros(num, *shape, dtype=torch.uint8, device=device)
    with progress(total=num * (2 * steps - 1 if sampler == "heun" else steps), desc=title) as bar:
        def counted(z, t):
            bar.update(len(z) * WORLD)
            return model(z, t)
        for start in range(RANK * CHUNK, num, WORLD * CHUNK):       # each process has its chunks, the sum has all
            set_seed(seed, EVALUATION, start // CHUNK)
            x = sample(counted, torch.randn(CHUNK, *shape, device=device)[:num - start], steps, sampler)
            images[start:start + CHUNK] = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    if WORLD > 1:
        dist.all_reduce(images)
    return images.cpu()

@torch.no_grad()
def features(net, images, device="cpu", t=0.1):
    """(N, D) float32: the spatial mean of the UNet's bottleneck for uint8 pictures, at a clock of little noise."""
    def encode(x):
        z = alpha_sigma(t)[0] * (x.to(device).float() / 127.5 - 1)
        return net(z, z.new_full((len(z),), t), bottleneck=True).mean((2, 3)).cpu()
    return torch.cat([encode(x) for x in images.split(CHUNK)])

def frechet_distance(a, b):
    """|μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of two (N, D) feature sets: a float, computed in float64.

    ValueError where a set has fewer than two rows or the two differ in D.
    """
    a, b = (torch.as_tensor(f).double().cpu() for f in (a, b))
    if a.ndim != 2 or b.ndim != 2 or min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"give two sets (N, D) with N > 1 and the same D, not {tuple(a.shape)} and {tuple(b.shape)}")
    cov_a, cov_b = (torch.atleast_2d(torch.cov(f.T)) for f in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()        # tr (C_a C_b)^½
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def inception(device):
    """uint8 pictures -> (N, 2048), the features of the published FID. ValueError where they are not to be had."""
    with blaming("--fid needs torchmetrics and Inception's weights", "pip install 'torchmetrics[image]', repeat the "
                 "command with a network for the weights, or run without --fid"):
        from torchmetrics.image.fid import FrechetInceptionDistance
        net = FrechetInceptionDistance().inception.to(device)
    return lambda images: torch.cat([net(x.to(device).expand(-1, 3, -1, -1)).cpu() for x in images.split(CHUNK)])

@torch.no_grad()
def evaluate(models, load, images, config, device, rulers):
    """(rows, pictures): each student at its own steps, the teacher with DDIM and the ancestral sampler at all steps.

    models: [(name, steps)], the teacher first; load(name): its Denoiser; rulers: {"fid": pictures -> features} or {},
    beside the teacher's own features; pictures: of each model, from the same noise.
    """
    num, teacher, rows, pictures = config["eval_samples"], load("teacher"), [], {}
    set_seed(config["seed"], EVALUATION)
    images = images[torch.randperm(len(images))[:10 * num]]
    rulers = {"fd": lambda images: features(teacher.net, images, device), **rulers}
    real = {name: encode(images) for name, encode in rulers.items()}
    jobs = [(*model, "ddim") for model in models]
    jobs += [("teacher", steps, sampler) for sampler in ("ddim", "ancestral") for _, steps in models]
    for name, steps, sampler in dict.fromkeys(jobs):            # the teacher is in there twice at its own steps
        model, title = teacher if name == "teacher" else load(name), f"evaluating {name}, {sampler} {steps}"
        fake = generate(model, num, images.shape[1:], steps, sampler, config["seed"], device, title)
        pictures.setdefault(name, fake)                         # first comes every model at its own steps
        drift = (fake.float() - pictures["teacher"].float()).div(127.5).square().mean().sqrt().item()
        distances = {ruler: frechet_distance(real[ruler], encode(fake)) for ruler, encode in rulers.items()}
        rows.append({"model": name, "steps": steps, "sampler": sampler, **distances, "rmse_to_teacher": drift})
    return rows, pictures

def table(stages, rows):
    """The final table of a run, as text."""
    cells, lines = {(row["model"], row["sampler"], row["steps"]): row for row in rows}, []
    for measure in [key for key in ("fd", "fid") if key in rows[0]]:
        lines.append(("{:>12}" * 6).format(f"{measure} at", "distilled", "DDIM", "ancestral", "drift", "seconds"))
        for stage in stages:
            steps, own = stage["steps"], cells[stage["model"], "ddim", stage["steps"]]
            distances = own[measure], *(cells["teacher", sampler, steps][measure] for sampler in ("ddim", "ancestral"))
            lines.append(("{:12}" + "{:12.4g}" * 5).format(steps, *distances, own["rmse_to_teacher"], stage["seconds"]))
    return "\n".join(lines + [
        "fd at N steps: Fréchet distance to the data in the teacher's own features (not the published FID), less is",
        "better; drift: RMSE to the full-step teacher's pictures from the same noise, on a scale from -1 to 1"])

def tile(images, columns):
    """uint8 (N, C, H, W) -> one array (rows * H, columns * W[, 3]); places without a picture are black."""
    N, C, H, W = images.shape
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -N % columns))
    return images.reshape(-1, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(-1, columns * W, C).squeeze(2).numpy()

def plot_samples(pictures, columns=16):
    """samples.png: a row per model, the same noise in every row."""
    first = [F.pad(images[:columns], (1, 1, 1, 1), value=255) for images in pictures.values()]
    figure = Figure(figsize=(0.5 * columns + 1.6, 0.5 * len(first) + 0.3), dpi=130)
    axes = figure.add_subplot(title="the same noise in every row", xticks=[])
    axes.imshow(tile(torch.cat(first), len(first[0])), cmap="gray", vmin=0, vmax=255)
    axes.set_yticks([(i + 0.5) * first[0].shape[2] for i in range(len(first))], pictures)
    axes.spines[:].set_visible(False)
    return figure

def plot_steps(rows):
    """steps.png: distance against sampling steps."""
    figure = Figure(figsize=(6, 4), dpi=130)
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="sampling steps",
                              ylabel="Fréchet distance (teacher's features)")
    for label, model, sampler in (("teacher, DDIM", "teacher", "ddim"), ("distilled", "student", "ddim"),
                                  ("teacher, ancestral", "teacher", "ancestral")):
        points = [(row["steps"], row["fd"]) for row in rows
                  if row["model"].startswith(model) and row["sampler"] == sampler]
        axes.plot(*zip(*points), "o-", label=label)
    steps = sorted({row["steps"] for row in rows})
    axes.set_xticks(steps, steps)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure

# ---- 10. Command line: settings, the files of a run, main --------------------------------------------------
SMALL = dict(                                                   # dropout, or 1,797 digits are learnt by heart
    channels=1, size=8, width=32, mults=[1, 2], blocks=1, attention=[], dropout=0.3, batch_size=64,
    teacher_updates=2300, lr=2e-3, warmup=100, ema=0.998, student_updates=150, student_lr=6e-4, eval_samples=192)
MIDDLE = dict(
    channels=1, size=28, width=32, mults=[1, 2, 2], blocks=1, attention=[4], dropout=0, batch_size=128,
    teacher_updates=10000, lr=1e-3, warmup=500, ema=0.999, student_updates=750, student_lr=5e-4, eval_samples=1024)
LARGE = dict(
    channels=3, size=32, width=128, mults=[1, 2, 2, 2], blocks=2, attention=[2, 4], dropout=0.2, flip=True,
    batch_size=128, teacher_updates=20000, lr=2e-4, warmup=1000, ema=0.9995, student_updates=1500, student_lr=1e-4,
    eval_samples=2048)
LARGE_ON_CPU = LARGE | dict(width=32, dropout=0, teacher_updates=4000, student_updates=300, eval_samples=256)
PRESETS = {"digits": SMALL, "mnist": MIDDLE, "fashion-mnist": MIDDLE}           # LARGE for cifar10 and for a folder
COMMON = dict(stages=8, final_steps=1, substeps=2, param="v", weighting="truncated", seed=0, flip=False, fid=False)
NOT_TRAINING = {"eval_samples", "fid", "device", "compile"}     # settings that leave the trained weights alone
MAX_STEPS = 8192                                                # the paper's most
SAVE_SECONDS = 20                                               # at least, from one latest.pt to the next

def settings(args, device, images=None):
    """The config of a run: the preset, what the command line says instead, and the shape of the data."""
    preset = PRESETS.get(args.dataset, LARGE_ON_CPU if device.type == "cpu" else LARGE)
    config = COMMON | {"dataset": args.dataset, "compile": device.type == "cuda"} | preset
    config |= {key: value for key, value in vars(args).items() if key in config and value is not None}
    config["device"] = device.type
    if images is not None:
        config |= {"images": len(images), "channels": images.shape[1], "size": images.shape[2]}
    if config["final_steps"] * config["substeps"] ** config["stages"] > MAX_STEPS:
        raise ValueError(f"the teacher's steps, final-steps x substeps^stages, exceed {MAX_STEPS}: lower one of them")
    if config["batch_size"] % WORLD:
        raise ValueError(f"{WORLD} processes can't share batches of {config['batch_size']}: give a multiple of {WORLD}")
    with torch.no_grad():                                       # raises where the network can't halve the pictures
        build(config, "cpu")(torch.zeros(1, config["channels"], config["size"], config["size"]), 1.0)
    return config

def build(config, device):
    """The Denoiser that a run's settings describe, with its first weights."""
    set_seed(config["seed"], INIT)
    channels = config["channels"]
    net = UNet(channels, config["width"], config["mults"], config["blocks"], config["attention"], config["dropout"],
               channels * (2 if config["param"] == "both" else 1))
    return Denoiser(net, config["param"]).to(device, memory_format=torch.channels_last).eval()

def write(path, save):
    """Write what save(file) writes, whole or not at all."""
    buffer, part = io.BytesIO(), Path(f"{path}.part")
    save(buffer)
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())                             # on the disk before it takes the place of the old one
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def write_json(path, content):
    write(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))

def load_model(path, device="cpu"):
    """(denoiser, info) from a teacher.pt or student-N.pt; info has its "config", its "stage" and its "log".

    ValueError for any other file; code hidden in it is never run.
    """
    with blaming(f"{path} is no checkpoint", "a whole teacher.pt or student-N.pt of a run is needed"):
        info = torch.load(path, map_location=device, weights_only=True)
        model = build(info["config"], device)
        model.load_state_dict(info["model"])
        return model, {key: info[key] for key in ("config", "stage", "log")}

def prepare(out, config, restart):
    """Make the folder of a run, or check that the run in it has these settings."""
    path, remedy = out / "config.json", "choose another --out, or overwrite it with --restart"
    names = "config.json teacher.pt student-*.pt latest.pt log.csv results.json samples.png steps.png".split()
    files = [file for name in names for file in out.glob(name)]
    if restart:
        for file in files:
            file.unlink()
    elif files:
        with blaming(f"{out} holds {files[0].name}, but no config.json or a damaged one", remedy):
            old = dict(json.loads(path.read_text()))
        other = [f"{key} is {old.get(key)} there, {config.get(key)} here" for key in sorted({*old, *config})
                 if old.get(key) != config.get(key) and key not in NOT_TRAINING]
        if other:
            raise ValueError(f"{out} holds a run with other settings ({'; '.join(other)}): {remedy}")
    out.mkdir(parents=True, exist_ok=True)
    for part in out.glob("*.part"):                             # left by a process that was killed
        part.unlink()
    write_json(path, config)

def environment(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "device_name": name, "cpus": os.cpu_count(), "processes": WORLD,
            "torch": torch.__version__, "python": platform.python_version()}

def training(config):
    return {key: config[key] for key in ("substeps", "weighting", "batch_size", "warmup", "ema", "flip", "seed")}

def run(config, images, out, device, restart):
    """Train the teacher, distill stage by stage, evaluate. The first process writes all the files of a run, here."""
    clocks = [config["final_steps"] * config["substeps"]**k for k in range(config["stages"], -1, -1)]   # 256, ..., 1
    models = [(f"student-{steps}" if stage else "teacher", steps) for stage, steps in enumerate(clocks)]
    rulers = {"fid": inception(device)} if config["fid"] else {}
    if RANK == 0:
        prepare(out, config, restart)
    barrier()
    data, latest, saved, stages, log, model = images.to(device), out / "latest.pt", time.monotonic(), [], [], None

    def write_log(rows):
        lines = [",".join(map(str, row)) + "\n" for row in [rows[0], *(row.values() for row in rows)]]
        write(out / "log.csv", lambda file: file.write("".join(lines).encode()))

    def save(state):
        """Write latest.pt, if the last time is a while ago; state: what `train` reports."""
        nonlocal saved
        if RANK == 0 and time.monotonic() - saved > SAVE_SECONDS:
            content = {"name": name, "seconds": time.monotonic() - began, "train": state}
            write(latest, lambda file: torch.save(content, file))
            write_log(log + state["rows"])
            saved = time.monotonic()

    for stage, (name, steps) in enumerate(models):
        path, teacher, began, resume = out / f"{name}.pt", model, time.monotonic(), None
        model, info = load_model(path, device) if path.exists() else (build(config, device), None)
        if config["compile"]:
            model.net.compile()
        if info is None:
            updates, lr = config["teacher_updates"], config["lr"]
            if teacher:                                         # a student starts as a copy of its teacher
                model.load_state_dict(teacher.state_dict())
                updates, lr = config["student_updates"], config["student_lr"]
                updates *= 2 if steps <= 2 else 1               # the hardest stages get twice as many (Section 5)
            if latest.exists():
                with blaming(f"{latest} is damaged", "remove it, or start again with --restart"):
                    state = torch.load(latest, map_location=device, weights_only=True)
                    if state["name"] == name:                   # else it is from an earlier stage
                        began, resume = began - state["seconds"], state["train"]
            rows = train(model, data, updates, teacher=teacher, steps=steps, lr=lr, stage=stage, title=name,
                         resume=resume, report=save, **training(config))
            seconds = time.monotonic() - began
            info = {"config": config, "model": model.state_dict(), "log": rows, "stage": {
                "model": name, "steps": steps, "updates": updates, "seconds": seconds,
                "images_per_second": updates * config["batch_size"] / seconds, "loss": rows[-1]["loss"]}}
            if RANK == 0:                                       # the checkpoint last: it says that the stage is done
                write_log(log + rows)
                write(path, lambda file: torch.save(info, file))
            barrier()
        stages, log = stages + [info["stage"]], log + info["log"]
        if RANK == 0:
            print("{model:12}{steps:6} steps{updates:8} updates{seconds:9.1f} s   loss {loss:.5f}".format(**stages[-1]))

    results = {}
    with contextlib.suppress(OSError, ValueError):
        results = json.loads((out / "results.json").read_text())
    if not results or any(results["config"][key] != config[key] for key in ("eval_samples", "fid")):
        evaluation, pictures = evaluate(models, lambda name: load_model(out / f"{name}.pt", device)[0], images, config,
                                        device, rulers)
        results = {"config": config, "environment": environment(device), "stages": stages, "evaluation": evaluation}
        if RANK == 0:
            for name, figure in (("samples.png", plot_samples(pictures)), ("steps.png", plot_steps(evaluation))):
                write(out / name, lambda file: figure.savefig(file, bbox_inches="tight"))
            write_json(out / "results.json", results)
    if RANK == 0:
        latest.unlink(missing_ok=True)
        print(table(stages, results["evaluation"]), f"{out} is finished; --restart runs it again", sep="\n")

def sample_to_file(args, device):
    """--sample: pictures from a checkpoint into a grid (.png), an array (.npz) or a folder of PNG files."""
    model, info = load_model(args.sample, device)
    own, out, size = info["stage"]["steps"], Path(args.out or "grid.png"), info["config"]["size"]
    steps = args.steps or own
    if info["stage"]["model"] != "teacher" and own % steps:
        raise ValueError(f"{args.sample} knows a clock of {own} steps: --steps {steps} does not divide it")
    if out.is_dir() and (out.suffix in (".png", ".npz") or any(out.iterdir())):
        raise ValueError(f"{out} is a folder already: give --out a new or empty one, a .png or an .npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    images = generate(model, args.num or 64, (info["config"]["channels"], size, size), steps, args.sampler or "ddim",
                      args.seed or 0, device)
    if out.suffix == ".npz":
        write(out, lambda file: np.savez_compressed(file, images.permute(0, 2, 3, 1).numpy()))
    elif out.suffix == ".png":
        grid, scale = tile(images, math.ceil(len(images) ** 0.5)), max(1, 32 // size)
        write(out, lambda file: Image.fromarray(grid.repeat(scale, 0).repeat(scale, 1)).save(file, "png"))
    else:
        with tempfile.TemporaryDirectory(dir=out.parent) as part:
            folder = Path(part, "pictures")                     # others can read this one, not a temporary folder
            folder.mkdir()
            for i, image in enumerate(images):
                Image.fromarray(tile(image[None], 1)).save(folder / f"{i:06}.png")
            os.replace(folder, out)
    print(f"{len(images)} pictures, {steps} step{'s' * (steps > 1)} each: {out}")

def benchmark(config, device, out):
    """--benchmark: the speed of training and sampling, and its share of what this machine can do at its best."""
    import resource                                             # here, for Windows has none
    from torch.utils.benchmark import Timer
    cuda, B, shape = device.type == "cuda", config["batch_size"], (config["channels"], config["size"], config["size"])
    kind = {"device": device, "dtype": torch.bfloat16 if cuda else torch.float32}

    def measure(job, num=1):
        """A job's speed, the median of several repeats after a first run, and its memory; num: its pictures."""
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            job()
        began = time.monotonic()
        job()
        first = time.monotonic() - began
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        timer = Timer("job()", globals={"job": job}, num_threads=torch.get_num_threads())
        seconds = timer.adaptive_autorange(max_run_time=60).median
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"images_per_second": num / seconds, "tflops": counter.get_total_flops() / seconds / 1e12,
                "peak_memory_gb": peak / 1e9, "compile_seconds": max(0, first - seconds) if config["compile"] else 0}

    with torch.no_grad():
        matrices = (torch.randn(n, n, **kind) for n in ((4096, 8192, 16384) if cuda else (1024, 2048)))
        layers = ((conv3(width, width).to(**kind, memory_format=torch.channels_last),
                   torch.randn(B, width, size, size, **kind).to(memory_format=torch.channels_last))
                  for width, size in ((32, 8), (64, 8), (128, 16), (256, 16)))      # made one by one, and let go
        best = {"matmul": max(measure(lambda: a @ a)["tflops"] for a in matrices),
                "conv": max(measure(lambda: layer(h))["tflops"] for layer, h in layers)}
    print("best matmul {matmul:.3f}, best 3x3 conv {conv:.3f} TFLOP/s".format(**best), f"({kind['dtype']})")
    model, teacher, rows = build(config, device), build(config, device), []
    for denoiser in (model, teacher) if config["compile"] else ():
        denoiser.net.compile()
    data, common = torch.randint(256, (1024, *shape), dtype=torch.uint8, device=device), training(config)
    for name, num, job in (
            ("teacher update", 10 * B, lambda: train(model, data, 10, **common)),
            ("student update", 10 * B, lambda: train(model, data, 10, teacher=teacher, steps=4, **common)),
            ("sampling, 1 step", CHUNK, lambda: generate(model, CHUNK, shape, 1, device=device)),
            ("sampling, 256 steps", CHUNK, lambda: generate(model, CHUNK, shape, 256, device=device))):
        row = {"job": name, **measure(job, num)}
        rows.append(row | {f"share_of_{ceiling}": row["tflops"] / best[ceiling] for ceiling in best})
        print("{job:20}{images_per_second:12,.0f} images/s{tflops:9.3f} TFLOP/s, {share_of_matmul:.0%} of the best "
              "matmul, {share_of_conv:.0%} of the best conv, peak {peak_memory_gb:.2f} GB".format(**rows[-1]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"config": config, "environment": environment(device), "ceilings_tflops": best, "rows": rows})

def number(kind, low, high):
    """An argparse type: a number from low to high."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number from {low:g} to {high:g}")
    return parse

def parse_args(argv):
    """The command line; what is not given is None and comes from the preset."""
    parser = argparse.ArgumentParser("pd.py", usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    count, steps, rate = number(int, 1, 10**9), number(int, 1, MAX_STEPS), number(float, 1e-9, 1e9)
    training, sampling = parser.add_argument_group("training"), parser.add_argument_group("with --sample")
    add = parser.add_argument
    add("--seed", type=number(int, 0, 2**32 - 1))
    add("--device", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    add("--out", help="the run's folder; with --sample a .png, an .npz or a folder")
    add = training.add_argument
    add("--dataset", help="digits (default), mnist, fashion-mnist, cifar10 or a folder")
    add("--data-dir", help="where downloads are kept, default data")
    add("--size", type=number(int, 2, 1024), help="resize and crop the pictures to a square")
    add("--stages", type=number(int, 1, 13), help="how often to distill")
    add("--final-steps", type=steps, help="sampling steps of the last student")
    add("--substeps", type=number(int, 2, MAX_STEPS), help="the teacher's steps for one of the student")
    add("--param", choices=PARAMS, help="what the network predicts")
    add("--weighting", choices=WEIGHTINGS, help="the weight of the x-error")
    add("--teacher-updates", type=count)
    add("--student-updates", type=count, help="in each stage; twice as many for 2 and 1 steps")
    add("--batch-size", type=number(int, 1, 16384), help="of all processes together")
    add("--width", type=number(int, 4, 2048), help="channels of the UNet at full resolution")
    add("--lr", type=rate)
    add("--student-lr", type=rate)
    add("--eval-samples", type=number(int, 2, 10**6), help="pictures of each model to evaluate")
    add("--restart", action="store_true", default=None, help="overwrite the run in the folder")
    add("--fid", action="store_true", default=None, help="also the published FID (torchmetrics)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default on a GPU")
    add("--benchmark", action="store_true", default=None, help="measure the speed, train nothing")
    add = sampling.add_argument
    add("--sample", metavar="CKPT", help="draw pictures from a checkpoint, train nothing")
    add("--num", type=number(int, 1, 10**6), help="how many pictures, default 64")
    add("--steps", type=steps, help="sampling steps, default the checkpoint's own")
    add("--sampler", choices=SAMPLERS, help="default ddim")
    args = parser.parse_args(argv)
    for action in (training if args.sample else sampling)._group_actions:
        if getattr(args, action.dest) is not None:
            parser.error(f"{action.option_strings[0]} {'does not go with' if args.sample else 'needs'} --sample")
    return args

def choose_device(name):
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name = name or ("cuda" if found else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name not in ("cpu", *found):
        raise ValueError(f"no device {name!r} here: give {' or '.join(['cpu', *found])}")
    return torch.device(name)

def main(argv=None):
    """The command line. Wrong input ends with status 2 and one line, Ctrl-C with 130."""
    args = parse_args(argv)
    try:
        device = choose_device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if WORLD > 1 and (args.sample or args.benchmark):
            raise ValueError("--sample and --benchmark are for one process: give the command without torchrun")
        if args.sample:
            return sample_to_file(args, device)
        if WORLD > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        args.dataset = args.dataset or "digits"
        name = Path(args.dataset).resolve().name
        if args.benchmark:
            out = Path(args.out or f"runs/benchmark-{name}-{device.type}.json")
            return benchmark(settings(args, device), device, out)
        if RANK > 0:                                            # the first process downloads, then the others load
            barrier()
        images, _ = load_dataset(args.dataset, args.data_dir or "data", args.size)
        if RANK == 0:
            barrier()
        config, out = settings(args, device, images), Path(args.out or f"runs/{name}")
        if RANK == 0:
            print(f"{args.dataset}: {len(images)} pictures of {'x'.join(map(str, images.shape[1:]))}; run in {out}")
        run(config, images, out, device, args.restart)
    except KeyboardInterrupt:
        print("pd.py: stopped; the same command continues a run where it last saved", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"pd.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
