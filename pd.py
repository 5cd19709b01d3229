"""pd.py: Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), in one file.

    python pd.py                                   # real handwritten digits, 256 -> 1 steps, on two CPU cores
    python pd.py --dataset cifar10 --stages 8      # the same on CIFAR-10, for a GPU
    python pd.py --sample runs/digits/student-1.pt --num 64 --out grid.png

Read it from top to bottom. Parts 1 to 5 are the paper: tensors of any shape, no devices, files or flags.
Parts 6 to 10 are the engineering. Sections, equations and algorithms are numbered as in arXiv:2202.00512.
"""
import argparse, contextlib, dataclasses, functools, inspect, io, itertools, json, math, os, shutil, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps

# ---- 1. Schedule: what is z_t? -----------------------------------------------------------------------------
# A noisy picture: z_t = α_t x + σ_t ε with ε ~ N(0, I). The clock t runs from 0 (data) to 1 (noise) while
# (α_t, σ_t) walks a quarter of the unit circle: α² + σ² = 1, the variance-preserving cosine schedule
# (Sections 2 and 4). It stops short of both ends: the log-SNR stays in [-20, 20], nothing is divided by zero.
FIRST_ANGLE = math.atan(math.exp(-10))          # at t = 0; at t = 1 it is arctan(e^10) = π/2 - FIRST_ANGLE

def alpha_sigma(t):
    """(α_t, σ_t), each of t's shape: the cosine and the sine of an angle that is linear in t. Section 4.
    t: float or (B,) tensor in [0, 1]. A float gives float64 scalars that leave the type of a factor."""
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
# Given z_t, to know x is to know ε, for z_t = α x + σ ε: in exact arithmetic it does not matter which of x, ε
# or v the network predicts. In practice it decides how the network's errors are amplified: the x̂ of an
# ε-network carries σ/α times its error, e^10 at t = 1, where a one-step student works (Section 4).
PARAMS = ("v", "eps", "x", "both")

def to_x_eps(out, z, t, param):
    """(x̂, ε̂), each (B, *dims), from the raw output of the network. Section 4.
    out: (B, *dims), for "both" (B, 2C, ...); z: (B, *dims); t: float or (B,). ValueError: unknown param.
    """
    alpha, sigma = alpha_sigma_for(z, t)
    if param == "v":                            # v = α ε - σ x, the velocity of z on the circle (Appendix D)
        return alpha * z - sigma * out, sigma * z + alpha * out
    if param == "eps":
        return (z - sigma * out) / alpha, out
    if param == "x":
        return out, (z - alpha * out) / sigma
    if param == "both":                         # x̂ is mostly x̃ in the noise, mostly from ε̃ near the data
        x_out, eps_out = out.chunk(2, dim=1)
        x_hat = sigma**2 * x_out + alpha * (z - sigma * eps_out)
        return x_hat, alpha**2 * eps_out + sigma * (z - alpha * x_out)      # (z - α x̂) / σ, multiplied out
    raise ValueError(f"param must be one of {', '.join(PARAMS)}, not {param!r}")

class Denoiser(nn.Module):
    """denoiser(z, t) -> (x̂, ε̂), from any network net(z, t) that gets t as a (B,) tensor. Section 4.
    All below asks no more of a `model` or `teacher`: a callable (z, t) -> (x̂, ε̂), a net or a formula."""

    def __init__(self, net, param="v"):
        super().__init__()
        if param not in PARAMS:
            raise ValueError(f"param must be one of {', '.join(PARAMS)}, not {param!r}")
        self.net, self.param = net, param

    def forward(self, z, t):
        clock = t.to(z) if torch.is_tensor(t) else z.new_full((), t)
        return to_x_eps(self.net(z, clock.expand(len(z))), z, t, self.param)

# ---- 3. Loss weights: which error counts how much? ---------------------------------------------------------
# Every loss is w(λ_t) ‖x - x̂‖². Because ε - ε̂ = -(α/σ)(x - x̂), the usual ‖ε - ε̂‖² has w = α²/σ² = SNR
# (Equation 9). At t = 1 that is e^-20: a one-step student would learn nothing. The paper keeps w ≥ 1.
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
    x_target, z: (B, *dims), the target being x for a teacher and x̃ for a student; t: float or (B,)."""
    x_hat, _ = model(z, t)
    return loss_weight(t, weighting) * (x_target - x_hat).square().reshape(len(z), -1).mean(1)

# ---- 4. Sampling: how do predictions become a picture? -----------------------------------------------------
# The probability-flow ODE (Equation 6) takes the noise away: in the plane of α and σ, dz = x̂ dα + ε̂ dσ.
# DDIM is its Euler step (Appendix B): hold x̂ and ε̂, move α and σ. Heun averages x̂ and ε̂ at both ends of
# the step. The ancestral sampler is no ODE: it draws z_s from the posterior as if x̂ were exact (Section 2).
SAMPLERS = ("ddim", "ancestral", "heun")

def ddim_step(x_hat, eps_hat, s):
    """z_s = α_s x̂ + σ_s ε̂, (B, *dims): the same x̂ and ε̂, with less noise. Equation 7."""
    alpha, sigma = alpha_sigma_for(x_hat, s)
    return alpha * x_hat + sigma * eps_hat

def ancestral_step(x_hat, z, t, s, noise_scale=1.0):
    """A draw of z_s, (B, *dims), from the posterior q(z_s | z_t = z, x = x̂), where s < t. Equations 3 to 5.
    noise_scale in [0, 1] interpolates the log of the variance between its lower (0) and upper bound (1)."""
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
    clip: limit x̂ to [-1, 1], recompute ε̂; noise_scale: see ancestral_step. Every sampler ends with a DDIM
    step: at t = 0 there is no noise to add, nothing to predict. ValueError: unknown sampler or steps < 1."""
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
# One step of the student shall end where two of the teacher end. Algorithm 2 solves this for x̃:
#     α_s x̃ + σ_s (z_t - α_t x̃) / σ_t = z_s    =>    x̃ = (z_s - (σ_s/σ_t) z_t) / (α_s - (σ_s/σ_t) α_t)
# Divided by σ, a DDIM step is z_s/σ_s = z_t/σ_t + (α_s/σ_s - α_t/σ_t) x̂. So steps add up, and x̃ is the mean
# of what the teacher predicts on its way, weighted by how α/σ grows: the same without a difference of almost
# equal numbers. Given z_t, x̃ has no variance: a student's loss can be zero, a denoiser's can't. And it is
# sharp where the step ends near the data, for there the teacher has decided on one picture.
@torch.no_grad()
def distill_target(teacher, z, t, s, substeps=2):
    """x̃, (B, *dims): a DDIM step with it from z_t = z to z_s ends where `substeps` of the teacher do.
    Algorithm 2. t, s: floats or (B,) tensors, s < t. ValueError for substeps < 1."""
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, not {substeps}")

    def alpha_over_sigma(t):
        alpha, sigma = alpha_sigma_for(z, t)
        return alpha / sigma

    x_tilde = torch.zeros_like(z)
    times = [(t * (substeps - i) + s * i) / substeps for i in range(substeps + 1)]      # t, t', then t'' = s
    for start, end in itertools.pairwise(times):
        x_hat, eps_hat = teacher(z, start)
        x_tilde = x_tilde + (alpha_over_sigma(end) - alpha_over_sigma(start)) * x_hat
        z = ddim_step(x_hat, eps_hat, end)
    return x_tilde / (alpha_over_sigma(s) - alpha_over_sigma(t))

# ---- 6. Network --------------------------------------------------------------------------------------------
# The UNet of DDPM: residual blocks with GroupNorm that t scales and shifts, attention, skip connections. The
# last layer of each block starts at zero. On a GPU it computes in bfloat16; all around it is float32.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # set by torchrun
EMBEDDING = 128                                                 # numbers that describe t to the network

def time_embedding(t, dim):
    """(B, dim): cosines, then sines of 1000 t at dim / 2 frequencies from 1 to almost 1/10000; t is (B,)."""
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
        self.norm, self.qkv = norm(width), nn.Conv2d(width, 3 * width, 1)
        self.out = zero(nn.Conv2d(width, width, 1))

    def forward(self, h):
        q, k, v = self.qkv(self.norm(h)).flatten(2).transpose(1, 2).chunk(3, dim=2)     # each (B, H W, C)
        return h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape))

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
        if self.training and self.dropout:                      # the whole batch's mask, then our slice
            out = out * F.dropout(torch.cat([torch.ones_like(out)] * WORLD), self.dropout).chunk(WORLD)[RANK]
        return self.attention(self.skip(h) + self.conv2(out))

class UNet(nn.Module):
    """net(z, t): (B, channels, H, W) and (B,) -> (B, outputs * channels, H, W). As in Section 5, but smaller.
    width: channels at the first resolution; mults: their multiple at each halving; blocks: how many for each;
    attention: down-sampling factors that attend, and the middle with them; patch: squares of this size become
    channels, at patch² times less cost. Pictures of any size: padded so that they halve, and cut out."""
    def __init__(self, channels, width, mults=(1, 2), blocks=1, attention=(), dropout=0, patch=1, outputs=1):
        super().__init__()
        self.patch, self.multiple = patch, patch * 2 ** (len(mults) - 1)        # of which H and W must be
        emb, h, skips = 4 * width, width, [width]
        self.embed = nn.Sequential(nn.Linear(EMBEDDING, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem, self.down, self.up = conv3(channels * patch**2, width), nn.ModuleList(), nn.ModuleList()
        for i, mult in enumerate(mults):
            if i > 0:
                self.down.append(conv3(h, h, stride=2))
                skips.append(h)
            for _ in range(blocks):
                self.down.append(ResBlock(h, width * mult, emb, dropout, 2**i in attention))
                h = width * mult
                skips.append(h)
        self.middle1 = ResBlock(h, h, emb, dropout, bool(attention))
        self.middle2 = ResBlock(h, h, emb, dropout, False)
        for i, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(h + skips.pop(), width * mult, emb, dropout, 2**i in attention))
                h = width * mult
            if i > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv3(h, width * mults[i - 1])))
                h = width * mults[i - 1]
        self.head = nn.Sequential(norm(h), nn.SiLU(), zero(conv3(h, outputs * channels * patch**2)))

    def forward(self, z, t, bottleneck=False):
        """With `bottleneck`, half-way: (B, C, H / multiple, W / multiple), in float32, for `features`."""
        H, W = z.shape[-2:]
        padded = F.pad(z, (0, -W % self.multiple, 0, -H % self.multiple))
        with torch.autocast(z.device.type, torch.bfloat16, enabled=z.is_cuda and not bottleneck):
            emb = self.embed(time_embedding(t, EMBEDDING))
            h = self.stem(F.pixel_unshuffle(padded, self.patch)).contiguous(memory_format=torch.channels_last)
            skips = [h]
            for layer in self.down:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
                skips.append(h)
            h = self.middle2(self.middle1(h, emb), emb)
            if bottleneck:
                return h
            for layer in self.up:
                block = isinstance(layer, ResBlock)
                h = layer(torch.cat([h, skips.pop()], dim=1), emb) if block else layer(h)
            return F.pixel_shuffle(self.head(h), self.patch)[..., :H, :W].to(z.dtype)

# ---- 7. Data: uint8 pictures, all of them in memory --------------------------------------------------------
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".pgm", ".ppm", ".tif", ".tiff", ".webp")

@contextlib.contextmanager
def explain(what, remedy):
    """Make one ValueError of whatever fails in here: what is wrong (why): what would be right."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {str(error)[:150]}): {remedy}") from error

def load_dataset(name, data_dir="data", size=None):
    """(images, labels): uint8 (N, C, H, W) and int64 (N,). ValueError for what can't be loaded.
    name: "digits" (from scikit-learn), "mnist", "fashion-mnist", "cifar10" (downloaded to data_dir) or a
    folder, flat or one subfolder a class. size: resize the shorter side to it and crop the centre."""
    if name == "digits":
        from sklearn.datasets import load_digits                # here, for the other data do without
        digits = load_digits()                                  # grey levels from 0 to 16
        pairs = zip((digits.images * 255 / 16).round().astype(np.uint8), digits.target)
    elif name in TORCHVISION:
        with explain(f"{name} could not be loaded", "repeat the command with a network, or put the files of "
                     f"torchvision's {TORCHVISION[name]} into {data_dir}"):
            import torchvision
            pairs = getattr(torchvision.datasets, TORCHVISION[name])(data_dir, download=True)
    else:
        pairs = load_folder(Path(name))
    images, labels = [], []
    for picture, label in pairs:
        if size:
            picture = ImageOps.fit(Image.fromarray(np.asarray(picture)), (size, size))
        images.append(np.atleast_3d(picture))
        labels.append(label)
    channels = max(image.shape[2] for image in images)          # one picture in colour makes all of them RGB
    images = [np.broadcast_to(image, (*image.shape[:2], channels)) for image in images]
    with explain("the pictures are not all of one size", f"give --size {min(images[0].shape[:2])}, say"):
        images = np.stack(images)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)

def load_folder(folder):
    """(picture, label) of every picture in a folder, the label being the number of its subfolder."""
    if not folder.is_dir():
        raise ValueError(f"no data set {folder}: give digits, {', '.join(TORCHVISION)} or a picture folder")
    files = sorted(file for file in folder.rglob("[!.]*") if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise ValueError(f"{len(files)} pictures in {folder}: at least 2 are needed ({' '.join(SUFFIXES)})")
    folders = sorted({file.parent for file in files})
    for file in files:
        with explain(f"{file} is not a readable picture", "mend or remove it"), Image.open(file) as picture:
            if picture.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel")
            picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        yield picture, folders.index(file.parent)

# ---- 8. Training: one loop for the teacher and for every student -------------------------------------------
# Algorithm 2 is Algorithm 1 but for two things: t is drawn from the student's discrete clock, for its sampler
# only visits t = 1/N, ..., 1, and x̃ takes the place of x. Random numbers depend on (seed, stage, update),
# so a stopped run goes on as if it had not been; all processes draw the whole batch and take their slices.
def set_seed(*key):
    """Seed torch by whole numbers: (seed, stage, update)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

def draw(data, num, flip):
    """`num` random examples; uint8 pictures become floats in [-1, 1], mirrored half the time if `flip`."""
    x = data[torch.randint(len(data), (num,), device=data.device)]
    if x.dtype == torch.uint8:
        x = x.float() / 127.5 - 1
    return torch.where(torch.rand(num, 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x) if flip else x

def train(model, data, updates, *, teacher=None, steps=None, substeps=2, weighting="truncated",
          batch_size=128, lr=1e-3, warmup=0, decay=0.0, ema=0.999, flip=False, seed=0, stage=0,
          every=100, resume=None, report=None):
    """Train a Denoiser in place on data (N, *dims): Algorithm 1, or with a teacher Algorithm 2, for `steps`.
    A teacher's lr rises for `warmup` updates and falls to 0 in the last `decay` (a fraction) of all; it ends
    as its moving average. A student's lr falls from the start. Every `every` updates: a row for the log,
    report(state); pass such a state as `resume` to continue. Returns the log. ValueError: loss not finite."""
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    weights = [p.detach() for p in model.parameters()]          # the same numbers, outside of autograd
    average = [w.clone() for w in weights] if teacher is None else []
    logged, log = 0, []
    if resume and resume["updates"] > 0:
        logged, log, average = resume["updates"], resume["log"], resume["average"]
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
    model.train(teacher is None)                                # dropout is for Algorithm 1 only
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    totals = torch.zeros(2, device=data.device)
    for update in range(logged, updates):
        set_seed(seed, stage, update)
        x = draw(data, batch_size, flip)
        eps = torch.randn_like(x)
        parts = torch.arange(batch_size, device=x.device) / batch_size
        t = 1 - (torch.rand(1, device=x.device) + parts) % 1    # Algorithm 1: in (0, 1], one in each part
        if teacher is not None:                                 # Algorithm 2: t is one of 1/N, 2/N, ..., 1
            t = torch.ceil(t * steps) / steps
        x, eps, t = (a.chunk(WORLD)[RANK] for a in (x, eps, t))
        alpha, sigma = alpha_sigma_for(x, t)
        z = alpha * x + sigma * eps
        if teacher is not None:                                 # Algorithm 2: x̃ instead of x
            x = distill_target(teacher, z, t, t - 1 / steps, substeps)
        loss = weighted_loss(net, x, z, t, weighting).mean()
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = lr * (1 - update / updates)
        if teacher is None:
            rate = min(lr, lr * (update + 1) / max(1, warmup), rate / max(1e-9, decay))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if average:                                             # its decay rate rises from 0.1 to ema
            torch._foreach_lerp_(average, weights, 1 - min(ema, (update + 1) / (update + 10)))
        totals += torch.stack([loss.detach(), grad_norm])
        if (update + 1) % every == 0 or update + 1 == updates:  # only here the host waits for the device
            if WORLD > 1:
                dist.all_reduce(totals)
            loss, grad_norm = (totals / (update + 1 - logged) / WORLD).tolist()
            if not math.isfinite(loss + grad_norm):
                raise ValueError(f"the loss is not finite at update {update + 1}; the last save is kept: "
                                 "give a lower --lr or --student-lr, and another --out or --restart")
            totals.zero_()
            logged = update + 1
            log.append({"update": logged, "loss": loss, "grad_norm": grad_norm, "lr": rate})
            if report and logged < updates:
                report({"updates": logged, "log": log, "model": model.state_dict(), "average": average,
                        "optimizer": optimizer.state_dict()})
    for p, a in zip(weights, average):
        p.copy_(a)
    model.eval()
    return log

# ---- 9. Evaluation: did it work? ---------------------------------------------------------------------------
# Fréchet distances compare features of the run's own teacher: this is not the published FID, nor a download.
CHUNK = 256                                                     # pictures sampled together
INIT, EVALUATION = 10**6, 10**6 + 1                             # for set_seed, beyond the numbers of stages

def generate(model, num, shape, steps, sampler="ddim", seed=0, device="cpu", clip=False):
    """uint8 pictures (num, *shape) on the CPU; one seed gives every model and sampler the same noise."""
    images = torch.zeros(num, *shape, dtype=torch.uint8, device=device)
    for start in range(RANK * CHUNK, num, WORLD * CHUNK):       # each process has its chunks, the sum has all
        set_seed(seed, EVALUATION, start // CHUNK)
        x = sample(model, torch.randn(CHUNK, *shape, device=device)[:num - start], steps, sampler, clip)
        images[start:start + CHUNK] = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    if WORLD > 1:
        dist.all_reduce(images)
    return images.cpu()

@torch.no_grad()
def features(net, images, device="cpu", t=0.1):
    """(N, D) float32: the mean over space of the UNet's bottleneck, for uint8 pictures with little noise."""
    chunks = []
    for x in images.split(CHUNK):
        z = alpha_sigma(t)[0] * (x.to(device).float() / 127.5 - 1)
        chunks.append(net(z, z.new_full((len(z),), t), bottleneck=True).mean((2, 3)).cpu())
    return torch.cat(chunks)

def frechet_distance(a, b):
    """|μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of two (N, D) feature sets: a float, from float64."""
    a, b = torch.as_tensor(a).double().cpu(), torch.as_tensor(b).double().cpu()
    cov_a, cov_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                             # C_a^½
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()        # tr (C_a C_b)^½
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()

def evaluate(models, images, config, device):
    """(rows, pictures) of {steps: (denoiser, record)}: the table; {label: uint8 (eval_samples, C, H, W)}."""
    full, num, rows, teachers, students = max(models), config.eval_samples, [], {}, {}
    teacher, _ = models[full]
    set_seed(config.seed, EVALUATION)
    real = features(teacher.net, images[torch.randperm(len(images))[:10 * num]], device)

    def draw_and_measure(model, steps, sampler="ddim"):
        pictures = generate(model, num, images.shape[1:], steps, sampler, config.seed, device)
        return pictures, frechet_distance(real, features(teacher.net, pictures, device))

    print("""\nFréchet distances in the teacher's features (no FID), and drift: RMSE to the teacher's pictures
     steps  distilled       ddim  ancestral      drift    seconds    updates""")
    for steps, (model, record) in models.items():
        teachers[steps], ddim = draw_and_measure(teacher, steps)
        _, ancestral = draw_and_measure(teacher, steps, "ancestral")
        students[steps], distilled = teachers[steps], ddim
        if steps < full:
            students[steps], distilled = draw_and_measure(model, steps)
        drift = ((students[steps].float() - teachers[full].float()) / 127.5).square().mean().sqrt().item()
        rows.append({"steps": steps, "distilled": distilled, "ddim": ddim, "ancestral": ancestral,
                     "drift": drift, "seconds": record["seconds"], "updates": record["updates"]})
        print(*(f"{value:10.5g}" for value in rows[-1].values()), flush=True)
    pictures = {f"teacher, {steps}": teachers[steps] for steps in (full, *list(models)[1:][-3:])}
    return rows, pictures | {f"student, {steps}": students[steps] for steps in list(models)[1:]}

def tile(images, columns):
    """uint8 (N, C, H, W) -> one array (rows * H, columns * W[, 3]); places without a picture are black."""
    N, C, H, W = images.shape
    grid = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -N % columns)).reshape(-1, columns, C, H, W)
    return grid.permute(0, 3, 1, 4, 2).reshape(-1, columns * W, C).squeeze(2).numpy()

def plot_samples(pictures, columns=16):
    """samples.png: a row per model, the same noise in every row."""
    rows = [F.pad(images[:columns], (1, 1, 1, 1), value=255) for images in pictures.values()]
    figure = Figure(figsize=(0.5 * columns + 1.6, 0.5 * len(rows) + 0.3), dpi=130)
    axes = figure.add_subplot(title="who draws, with how many steps; the same noise in every row", xticks=[])
    axes.imshow(tile(torch.cat(rows), len(rows[0])), cmap="gray", vmin=0, vmax=255)
    axes.set_yticks([(i + 0.5) * rows[0].shape[2] for i in range(len(rows))], pictures)
    return figure

def plot_steps(rows):
    """steps.png: distance against sampling steps."""
    figure = Figure(figsize=(6, 4), dpi=130)
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="sampling steps", ylabel="Fréchet distance")
    steps = [row["steps"] for row in rows]
    for column in ("ddim", "ancestral", "distilled"):
        axes.plot(steps, [row[column] for row in rows], "o-", label=column)
    axes.set_xticks(steps, steps)
    axes.legend()
    return figure

# ---- 10. Settings, the ladder, the files of a run, the command line ----------------------------------------
@dataclasses.dataclass
class Config:
    """Every setting of a run: the digits' values; PRESETS has others. An int, float or str is a flag, too."""
    dataset: str = "digits"             # digits, mnist, fashion-mnist, cifar10 or a folder of pictures
    size: int = None                    # resize and crop the pictures to squares of this size
    shape: tuple = (1797, 1, 8, 8)      # pictures, channels, height, width; no flag: the data say it
    flip: bool = False                  # mirror half of the pictures; no flag: presets say it
    seed: int = 0                       # another seed, another run; with --sample, other pictures
    stages: int = 8                     # how often to distill
    final_steps: int = 1                # sampling steps of the last student
    substeps: int = 2                   # the teacher's steps for one of the student
    param: str = "v"                    # what the network predicts: v, eps, x or both
    weighting: str = None               # of the x-error: truncated, snr+1, snr (default for eps), constant
    width: int = 32                     # channels of the UNet at its first resolution
    mults: tuple = (1, 2)               # their multiple at each halving; no flag
    blocks: int = 1                     # residual blocks per resolution
    attention: tuple = ()               # down-sampling factors that attend; no flag
    patch: int = 1                      # squares of this size become channels
    dropout: float = 0.3                # of the teacher, or it learns 1,797 digits by heart
    batch_size: int = 64                # pictures per update, of all processes together
    teacher_updates: int = 1500         # updates of the first teacher
    lr: float = 2e-3                    # learning rate of the first teacher
    warmup: int = 100                   # its updates in which lr rises from 0
    decay: float = 0.5                  # the last part of its updates, in which lr falls to 0
    ema: float = 0.998                  # decay rate of its moving average
    student_updates: int = 180          # updates of a student; twice as many for 2 and 1 steps (Section 5)
    early_share: float = 0.4            # the part of them that a student of more than 16 steps gets
    student_lr: float = 6e-4            # learning rate of a student at its start; it falls to 0
    early_lr: float = 2e-4              # the same, of a student of more than 16 steps
    save_every: int = 200               # updates from one save to the next
    eval_samples: int = 128             # pictures of each model to evaluate

    def __post_init__(self):
        if self.weighting is None:      # ε with truncated SNR diverges (Table 1)
            self.weighting = "snr" if self.param == "eps" else "truncated"

    def ladder(self):
        """{steps: updates} of all models, the teacher's first: 256, 128, ..., 1 steps."""
        updates = {}
        for k in range(self.stages, -1, -1):
            steps = self.final_steps * self.substeps**k
            share = 2 if steps <= 2 else 1 if steps <= 16 else self.early_share
            updates[steps] = max(1, math.ceil(share * self.student_updates))
        return updates | {max(updates): self.teacher_updates}

GREY = dict(mults=(1, 2, 2), attention=(4,), dropout=0, batch_size=128, teacher_updates=10000, lr=1e-3,
            warmup=500, ema=0.999, student_updates=750, student_lr=5e-4, early_lr=5e-4, eval_samples=1024)
LARGE = dict(flip=True, width=128, mults=(1, 2, 2, 2), blocks=2, attention=(2, 4), dropout=0.2,
             batch_size=128, teacher_updates=20000, lr=2e-4, warmup=1000, ema=0.9995, student_updates=1500,
             student_lr=1e-4, early_lr=1e-4, eval_samples=2048)
ON_CPU = dict(patch=2, mults=(1, 2, 2), blocks=1, attention=(4,), dropout=0, batch_size=64, lr=1e-3,
              warmup=300, ema=0.999, student_lr=3e-4, early_lr=1e-4, eval_samples=256)
PRESETS = {
    "digits": {}, "grey": GREY, "large": LARGE,
    "grey-cpu": GREY | ON_CPU | dict(teacher_updates=2400, student_updates=300),
    "large-cpu": LARGE | ON_CPU | dict(width=48, teacher_updates=7000, student_updates=600),
    "paper": LARGE | dict(
        width=256, mults=(1, 1, 1), blocks=3, param="x", stages=13, teacher_updates=800_000, ema=0.9999,
        decay=0, student_updates=50_000, early_share=1, student_lr=5e-5, early_lr=5e-5)}

def configure(args, images, device):
    """The Config of a run: the preset that is asked for, or that fits, then the flags, then the data."""
    _, channels, H, W = shape = tuple(images.shape)
    preset = "grey" if channels == 1 and max(H, W) <= 32 else "large"
    preset = "digits" if max(H, W) <= 16 else preset + "-cpu" * (device.type == "cpu")
    flags = {name: value for name, value in vars(args).items() if value is not None and hasattr(Config, name)}
    config = Config(**PRESETS[args.preset or preset] | flags | {"shape": shape})
    if max(config.ladder()) > 8192:
        raise ValueError("final-steps x substeps^stages is over 8,192, the paper's most: lower one of them")
    if config.batch_size % WORLD:
        raise ValueError(f"--batch-size must be a multiple of the {WORLD} processes, not {config.batch_size}")
    return config

def build(config, device):
    """The Denoiser that a run's settings describe, with its first weights."""
    set_seed(config.seed, INIT)
    net = UNet(config.shape[1], config.width, config.mults, config.blocks, config.attention, config.dropout,
               config.patch, outputs=2 if config.param == "both" else 1)
    return Denoiser(net, config.param).to(device, memory_format=torch.channels_last).eval()

def run(config, images, out, device, compile_net=False):
    """Train a teacher, distill it stage by stage, evaluate; all files go into the folder `out`."""
    data, models, teacher = images.to(device), {}, None
    for stage, (steps, updates) in enumerate(config.ladder().items()):
        path = out / ("teacher.pt" if stage == 0 else f"student-{steps}.pt")
        if path.exists():
            model, record = load_model(path, device)
        else:
            model, record = build(config, device), {"updates": 0, "seconds": 0.0}
            if teacher is not None:
                model.load_state_dict(teacher.state_dict())     # a student starts as a copy of its teacher
        if compile_net:
            model.net.compile()
        if record["updates"] < updates:
            record = train_and_save(model, teacher, data, config, stage, steps, updates, record, path)
        models[steps] = model, record
        teacher = model                                         # the student becomes the next teacher
    if not (out / "results.json").exists():
        save_results(out, config, device, models, *evaluate(models, images, config, device))
    print(f"{out} is finished, results.json has its table; --restart runs it again")

def train_and_save(model, teacher, data, config, stage, steps, updates, record, path):
    """Train one model of the ladder, on from its record. Returns its new record, which its file now holds:
    config, name, steps, seconds, updates (done), log, model (weights); in training, average and optimizer."""
    began = time.monotonic() - record["seconds"]

    def save(state):
        record = {"config": dataclasses.asdict(config), "name": path.stem, "steps": steps,
                  "seconds": time.monotonic() - began, **state}
        with whole_file(path) as file:
            torch.save(record, file)
        print(f"{path.stem:12}{record['updates']:8,} of {updates:,} updates, {record['seconds']:.0f} s, "
              f"loss {record['log'][-1]['loss']:.5f}", flush=True)
        return record

    student_lr = config.early_lr if steps > 16 else config.student_lr
    log = train(model, data, updates, teacher=teacher, steps=steps, stage=stage, report=save,
                lr=student_lr if teacher else config.lr, substeps=config.substeps, weighting=config.weighting,
                batch_size=config.batch_size, warmup=config.warmup, decay=config.decay, ema=config.ema,
                flip=config.flip, seed=config.seed, every=config.save_every, resume=record)
    return save({"updates": updates, "log": log, "model": model.state_dict()})

def load_model(path, device="cpu"):
    """(denoiser, record) of a checkpoint; of a teacher in training, its average. ValueError: other files."""
    with explain(f"{path} is no checkpoint", "give a teacher.pt or student-N.pt; mend a run with --restart"):
        record = torch.load(path, map_location=device, weights_only=True)
        model = build(Config(**record["config"]), device)
        model.load_state_dict(record["model"])
        for weight, average in zip(model.parameters(), record.get("average", [])):
            weight.detach().copy_(average)
    return model, record

@contextlib.contextmanager
def whole_file(path):
    """A file to write, that appears at `path` whole or not at all; only the first process writes."""
    buffer, part = io.BytesIO(), Path(f"{path}.part")
    yield buffer
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(buffer.getbuffer())
        with open(part, "rb+") as file:
            os.fsync(file.fileno())                             # on the disk before it replaces the old one
        os.replace(part, path)

def prepare(out, config, restart):
    """Make the folder of a run, or check that the run in it has these settings."""
    names = "config.json", "teacher.pt", "student-*.pt", "log.csv", "results.json", "samples.png", "steps.png"
    files = [file for name in names for file in out.glob(name)]
    here = json.loads(json.dumps(dataclasses.asdict(config)))   # as a file has it: lists, no tuples
    remedy = "choose another --out, or overwrite it with --restart"
    if files and not restart:
        with explain(f"{out} holds {files[0].name}, but no config.json or a damaged one", remedy):
            there = json.loads((out / "config.json").read_text())
            other = [f"{key} {there[key]}, not {here[key]}" for key in here if there[key] != here[key]]
        if other:
            raise ValueError(f"{out} holds a run with other settings ({', '.join(other)}): {remedy}")
    for file in files if restart else ():
        file.unlink()
    with whole_file(out / "config.json") as file:
        file.write(json.dumps(here, indent=1).encode())

def save_results(out, config, device, models, rows, pictures):
    """log.csv, the two pictures, and last results.json, which says that the run is finished."""
    lines = ["model,update,loss,grad_norm,lr"]
    for _, record in models.values():
        lines += [",".join(map(str, (record["name"], *row.values()))) for row in record["log"]]
    results = {"config": dataclasses.asdict(config), "torch": torch.__version__, "device": device.type,
               "processes": WORLD, "rows": rows}
    for name, figure in ("samples.png", plot_samples(pictures)), ("steps.png", plot_steps(rows)):
        with whole_file(out / name) as file:
            figure.savefig(file, bbox_inches="tight")
    for name, text in ("log.csv", "\n".join([*lines, ""])), ("results.json", json.dumps(results, indent=1)):
        with whole_file(out / name) as file:
            file.write(text.encode())

def sample_to_file(args, device):
    """--sample: pictures from a checkpoint into a grid (.png), an array (.npz) or a folder of PNG files."""
    model, record = load_model(args.sample, device)
    out, steps, shape = Path(args.out or "grid.png"), args.steps or record["steps"], record["config"]["shape"]
    if out.is_dir() or out.exists() and out.suffix not in (".png", ".npz"):
        raise ValueError(f"{out} is already there: give --out a .png, an .npz or a new folder")
    images = generate(model, args.num or 64, shape[1:], steps, args.sampler or "ddim", args.seed or 0, device,
                      clip=args.clip)
    if out.suffix == ".npz":
        with whole_file(out) as file:
            np.savez_compressed(file, images.permute(0, 2, 3, 1).numpy())
    elif out.suffix == ".png":
        grid, scale = tile(images, math.ceil(len(images) ** 0.5)), max(1, 32 // shape[2])
        with whole_file(out) as file:
            Image.fromarray(grid.repeat(scale, 0).repeat(scale, 1)).save(file, "png")
    elif RANK == 0:
        part = Path(f"{out}.part")                              # the whole folder, or none
        shutil.rmtree(part, ignore_errors=True)                 # the rest of a command that was stopped
        part.mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(tile(image[None], 1)).save(part / f"{i:06}.png")
        os.replace(part, out)
    print(f"{len(images)} pictures, {steps} step{'s' * (steps > 1)} each: {out}")

def parse_args(argv):
    """The command line; what is not given is None. A wrong flag ends the program."""
    parser = argparse.ArgumentParser(
        "pd.py", usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
        epilog=inspect.getsource(Config), formatter_class=argparse.RawDescriptionHelpFormatter)
    training, sample = parser.add_argument_group("training"), parser.add_argument_group("with --sample")
    choices = {"param": PARAMS, "weighting": WEIGHTINGS}
    for field in dataclasses.fields(Config):
        if field.type in (int, float, str):
            flag = f"--{field.name.replace('_', '-')}"
            training.add_argument(flag, type=field.type, choices=choices.get(field.name))
    training.add_argument("--preset", choices=PRESETS, help="default: what fits the pictures and the device")
    training.add_argument("--data-dir", help="where downloads are kept, default data")
    training.add_argument("--restart", action="store_true", default=None, help="overwrite the run in --out")
    training.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on cuda")
    sample.add_argument("--sample", metavar="CKPT", help="draw pictures from a checkpoint, train nothing")
    sample.add_argument("--num", type=int, help="how many pictures, default 64")
    sample.add_argument("--steps", type=int, help="sampling steps, default the checkpoint's own")
    sample.add_argument("--sampler", choices=SAMPLERS, help="default ddim")
    sample.add_argument("--clip", action="store_true", default=None, help="limit every x̂ to [-1, 1]")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    parser.add_argument("--device", choices=devices, help="default: cuda where there is one")
    parser.add_argument("--out", help="the run's folder, or a file or folder for --sample")
    args = parser.parse_args(argv)
    least = {"substeps": 2, "eval_samples": 2} | dict.fromkeys(
        ("seed", "warmup", "lr", "student_lr", "early_lr", "decay", "dropout", "ema", "early_share"), 0)
    for name, value in vars(args).items():
        flag, sampling = f"--{name.replace('_', '-')}", name in ("num", "steps", "sampler", "clip")
        low, high = least.get(name, 1), 1 if name in ("decay", "dropout", "ema", "early_share") else 10**9
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"{flag} must be from {low} to {high}, not {value}")
        if sampling != bool(args.sample) and value and name not in ("sample", "seed", "device", "out"):
            parser.error(f"{flag} {'needs' if sampling else 'does not go with'} --sample")
    return args

def main(argv=None):
    """The command line. Wrong input ends with status 2 and one line, Ctrl-C with 130."""
    args = parse_args(argv)
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":                               # under torchrun each process has its own card
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if WORLD > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            sys.stdout = open(os.devnull, "w") if RANK > 0 else sys.stdout      # one process speaks for all
        if args.sample:
            return sample_to_file(args, device)
        for turn in ("first", "others"):                        # one process downloads, then the others load
            if (turn == "first") == (RANK == 0):
                images, _ = load_dataset(args.dataset or "digits", args.data_dir or "data", args.size)
                config = configure(args, images, device)
                out = Path(args.out or f"runs/{Path(config.dataset).resolve().name}")
                prepare(out, config, args.restart and RANK == 0)
            if WORLD > 1:
                dist.barrier()
        size, ladder = sum(p.numel() for p in build(config, "cpu").parameters()), config.ladder()
        print(f"{len(images):,} pictures of {'x'.join(map(str, images.shape[1:]))}; {size:,} parameters; "
              f"{sum(ladder.values()):,} updates; {max(ladder)} -> {min(ladder)} steps; in {out}", flush=True)
        run(config, images, out, device, device.type == "cuda" if args.compile is None else args.compile)
    except KeyboardInterrupt:
        print("pd.py: stopped; the command, without --restart, continues from the last save", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"pd.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                    # a terminal without x̂ and é shows ?
    main()
