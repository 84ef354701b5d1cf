"""Measure whether the prior's draws show what their class names, and whether they are as varied as photographs.

python tests/tools/measure_prior.py --data-dir DIR [--output-dir OUT]

writes checkpoints/prior.csv, which the notebook shows. The judge is a small classifier of our own: it is trained on the
train split, on the photographs and on what the grid model makes of them, so that softness alone does not decide. Its
weights are kept in OUT/cache/classifier.safetensors; delete that file to train it again.

Each row is DRAWS codes of each class, decoded by the grid model; the last rows are as many pictures of the training and
of the test split, reconstructed, and those of the test split as they are. Columns: called is the share that the
classifier calls by their class, called_horse and called_bird the same of these two classes alone; probability is what it
gives the right class, on average; frechet is the Frechet distance, in its 256 features, to as many other test
photographs. That is biased upwards by an amount that depends on DRAWS, so read it against the last row, and compare
only what has the same DRAWS.

Beware: the classifier knows the training pictures by heart, and the Gaussians and the flow are made of the same ones. So
they can be called right more often than test pictures are, up to the row of the training pictures.

Printed besides: the classifier's accuracy, times, and how near horses and mended pegasi come to training pictures.
"""

import csv
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

SHIPPED = Path(__file__).parents[2] / "checkpoints"
sys.path.insert(0, str(SHIPPED.parent))

import pegasus_vae as pv  # noqa: E402

GRID_MODEL = SHIPPED / "pegasus_vae_spatial.safetensors"
PRIOR = SHIPPED / "prior.safetensors"
TABLE = SHIPPED / "prior.csv"
DRAWS = 50  # of each class
FLOWS = {  # guidance and midpoint steps
    "flow with guidance 1": (1, 16),
    "flow with guidance 2": (2, 16),
    "flow with guidance 4": (4, 16),
    "flow with guidance 7": (7, 16),
    "flow with guidance 2 in 8 steps": (2, 8),
    "flow with guidance 2 in 4 steps": (2, 4),
}
BATCH_SIZE, EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 128, 24, 3e-3, 0.05  # of the classifier


def build_classifier(info):
    """The network that info describes: features (N, 256) by the first three stages of a ResNet, then logits."""
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)  # 7x7 is for larger pictures
    network.layer4 = network.fc = nn.Identity()
    return nn.Sequential(network, nn.Linear(256, len(info["classes"])))


def train_classifier(images, labels, info, device):
    """Train on images uint8 (N, 3, H, W) and labels (N,), cut out and mirrored at random; returns the classifier."""
    classifier = build_classifier(info).to(device, memory_format=torch.channels_last)
    augment = v2.Compose([v2.RandomResizedCrop(images.shape[-1], scale=(0.5, 1)), v2.RandomHorizontalFlip()])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    total = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total)
    for epoch in range(EPOCHS):
        losses = []
        for batch in torch.randperm(len(images)).split(BATCH_SIZE)[: total // EPOCHS]:
            x = pv.prepare_batch(torch.stack([augment(image) for image in images[batch]]), device)
            with pv.mixed_precision(device):
                logits = classifier(x)
            loss = F.cross_entropy(logits.float(), labels[batch].to(device), label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
        print(f"classifier, epoch {epoch + 1} of {EPOCHS}: loss {torch.stack(losses).mean():.3f}", flush=True)
    return classifier


def load_classifier(cfg, vae, codes):
    """The classifier, in eval() and on the CPU, from the cache or trained; codes: of the train split (N, latent_dim)."""
    path = cfg.output_dir / "cache" / "classifier.safetensors"
    images, labels, classes = pv.load_split(cfg, "train")
    info = {"classes": classes, "vae": pv.weights_digest(vae), "images": pv.fingerprint(images)}
    with suppress(pv.ReaderError):
        classifier, found = pv.load_weights(path, build_classifier)
        if found == info:
            return classifier
    torch.manual_seed(cfg.seed)
    both = torch.cat([images, (decode(vae, codes) * 255).round().byte()])
    started = time.perf_counter()
    classifier = train_classifier(both, labels.repeat(2), info, pv.device_of(vae))
    print(f"classifier trained in {time.perf_counter() - started:.0f} s")
    pv.save_checkpoint(path, classifier, info)
    return pv.load_weights(path, build_classifier)[0]


def decode(vae, codes):
    """Pictures of codes, as pv.decode_images, by fast arithmetic."""
    with pv.mixed_precision(pv.device_of(vae)):
        return pv.decode_images(vae, codes)


class Judge:
    """The classifier, and the Frechet distance in its features to some photographs uint8 (N, 3, H, W)."""

    def __init__(self, classifier, classes, photographs):
        self.classifier, self.classes = classifier, classes
        options = {"normalize": True, "input_img_size": photographs.shape[1:]}  # floats of this size
        self.distance = FrechetInceptionDistance(classifier[0], reset_real_features=False, **options)
        self.show(photographs, real=True)

    def show(self, images, real):
        """Let the metric gather the features of images, in double precision."""
        for batch in images.split(64):
            self.distance.update(pv.as_float(batch), real=real)

    def call(self, images, labels):
        """The shares called by their label: {"called", "called_horse", "called_bird", "probability"}, see above."""
        with pv.eval_mode(self.classifier):
            logits = torch.cat([self.classifier(pv.as_float(batch)) for batch in images.split(64)])
        right = (logits.argmax(dim=1) == labels).float()
        row = {"called": right.mean().item()}
        for name in ("horse", "bird"):
            row[f"called_{name}"] = right[labels == self.classes.index(name)].mean().item()
        return row | {"probability": logits.softmax(dim=1).gather(1, labels[:, None]).mean().item()}

    def describe(self, rung, images, labels):
        """The row of the table for images of a rung."""
        row = self.call(images, labels)
        self.show(images, real=False)
        row["frechet"] = self.distance.compute().item()
        self.distance.reset()  # but for the photographs
        return {"rung": rung} | {name: round(value, 4) for name, value in row.items()}


def some_of_each(labels, values, count):
    """Indices of count of each of the label values, evenly spread over those that have it, class by class."""
    return torch.cat([pv.evenly_spread((labels == value).nonzero()[:, 0], count) for value in values])


def draw_all(prior, class_codes, seed):
    """Yield (rung, codes), DRAWS of each class, class by class.

    class_codes: for each class the codes of its training pictures and their mirror images (N, latent_dim).
    """
    torch.manual_seed(seed)
    yield "N(0, I)", torch.randn(len(class_codes) * DRAWS, class_codes[0].shape[1])
    yield "Gaussian of the class", torch.cat([pv.fit_gaussian(codes).sample((DRAWS,)) for codes in class_codes])
    for rung, (guidance, steps) in FLOWS.items():
        parts = [
            pv.draw_codes(prior, DRAWS, name, guidance, seed + label, steps) for label, name in enumerate(prior.classes)
        ]
        yield rung, torch.cat(parts)


def print_nearest(what, images, codes, training_images, training_codes):
    """Print how near images and their standardised codes come to training pictures or their mirror images."""
    of_codes = torch.cdist(codes, training_codes).amin(dim=1) / codes.shape[1] ** 0.5
    for of, distance in (("pixels", pv.nearest(images, training_images)[1]), ("codes", of_codes)):
        print(f"{what}, nearest of training by {of}: {distance.min():.3f} at the least, median {distance.median():.3f}")


def print_copies(images, decoded):
    """Print how far training pictures are from what is decoded of their codes, so how near a copy would be."""
    distance = (pv.as_float(images) - decoded).square().mean(dim=(1, 2, 3)).sqrt()
    print(f"copies, decoded, would be as near by pixels as {distance.min():.3f}, median {distance.median():.3f}")


def measure(prior, vae, judge, class_codes, labels, seed):
    """Draw, decode and judge each rung; returns the rows, and images and codes of the rung "flow with guidance 2"."""
    rows, kept, started = [], None, time.perf_counter()
    for rung, codes in draw_all(prior, class_codes, seed):
        drawn = time.perf_counter()
        images = decode(vae, codes)
        decoded = time.perf_counter()
        rows.append(judge.describe(rung, images, labels))
        each = [f"{1000 * seconds / len(codes):.1f} ms" for seconds in (drawn - started, decoded - drawn)]
        print(f"{rows[-1]}: {each[0]} a draw, {each[1]} to decode it", flush=True)
        if rung == "flow with guidance 2":
            kept = images, codes
        started = time.perf_counter()
    return rows, kept


def mended_pegasi(cfg, vae, prior):
    """The shipped compositions, mended by 0.3 as in the notebook: images and codes."""
    choices = pv.Choices.model_validate_json((SHIPPED / "picks.json").read_bytes())
    horses, birds = (pv.load_candidates(cfg, vae, name) for name in ("horse", "bird"))
    made = [choices.compositions[horse] for horse in choices.horse]
    z = pv.compose(vae, horses.latents[choices.horse], birds.images[[composition.bird for composition in made]], made)
    z = pv.mend_codes(prior, z, 0.3, cells=pv.wing_cells(made, vae.decoder.grid[1]))
    return decode(vae, z), z


def main():
    begun = time.perf_counter()
    cfg = pv.read_config(sys.argv[1:])
    device, cpu = pv.find_device(cfg), torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device} ({name}), {platform.machine()}, torch {torch.__version__}")
    prior, vae = pv.load_prior(PRIOR)[0].to(device), pv.load_checkpoint(GRID_MODEL)[0].to(device)
    classes = prior.classes
    training_codes, training_labels = pv.load_codes(cfg, vae, "train+unlabeled", classes, cpu)
    class_codes = [training_codes[training_labels == 1 + i].flatten(0, 1).float() for i in range(len(classes))]
    classifier = load_classifier(cfg, vae, training_codes[training_labels > 0, 0].float())

    photographs, labels, _ = pv.load_split(cfg, "test")
    codes = pv.load_codes(cfg, vae, "test", classes, cpu)[0][:, 0].float()
    chosen, others = some_of_each(labels, range(len(classes)), 2 * DRAWS).view(-1, 2).T  # disjoint
    judge = Judge(classifier, classes, photographs[others])
    for what, images in (("photographs", photographs), ("reconstructions", decode(vae, codes))):
        print(f"classifier, {len(images)} test {what}: {judge.call(images, labels)}", flush=True)

    photographs, codes, labels = photographs[chosen], codes[chosen], labels[chosen]
    rows, (drawn, drawn_codes) = measure(prior, vae, judge, class_codes, labels, cfg.seed)
    learned = some_of_each(training_labels, range(1, 1 + len(classes)), DRAWS)
    copies, reconstructions = decode(vae, training_codes[learned, 0].float()), decode(vae, codes)
    real = {"training pictures, reconstructed": copies, "test pictures, reconstructed": reconstructions}
    for rung, images in (real | {"test pictures": photographs}).items():
        rows.append(judge.describe(rung, images, labels))
        print(rows[-1], flush=True)
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    pegasi = mended_pegasi(cfg, vae, prior)
    prior, horses = prior.cpu(), labels == classes.index("horse")
    pool = pv.load_images(cfg, "train+unlabeled"), prior.standardise(training_codes.flatten(0, 1).float())
    for what, images, z in (("draws", drawn, drawn_codes), ("test pictures, reconstructed", reconstructions, codes)):
        print_nearest(f"horses, {what}", images[horses], prior.standardise(z[horses]), *pool)
    print_nearest("mended pegasi", pegasi[0], prior.standardise(pegasi[1]), *pool)
    print_copies(pool[0][learned[horses]], copies[horses])
    print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
