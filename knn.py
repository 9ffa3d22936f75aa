"""k-nearest-neighbour accuracy of frozen features: what eval_knn.py prints, and what a run looks at on its way.

Weighted as in section 4.1 of the paper, after arXiv 1805.01978.
"""

import time

import torch
import torch.nn.functional as F

import dino_data
import utils

# ---- features ----


def labelled_features(model, sets, batch_size, num_workers, device, use_cuda=True, stop=None):
    """(train features, train labels, test features, test labels), the features L2-normalised; None but on rank 0.

    `sets` are two data sets of (image, index) and their labels, [N] each. `stop`, a StopRequest, may end it with a
    utils.Stopped. All ranks have to call it.
    """
    train, test, train_labels, test_labels = sets
    features = []
    for dataset in (train, test):
        # A signal to the whole process group is for the process that answers it.
        in_worker = utils.ignore_signals if stop else None
        loader = dino_data.eval_loader(dataset, batch_size, num_workers, device, in_worker)
        features.append(utils.extract_features(model, loader, use_cuda, stop=stop))
    if not utils.is_main_process():
        return None
    train_features, test_features = (F.normalize(f, dim=1) for f in features)
    return train_features, train_labels.to(train_features.device), test_features, test_labels.to(test_features.device)


# ---- classifier ----

NUMBERS_AT_ONCE = 2**25  # similarities, or votes, held at a time: 128 MB


def knn_classifier(train_features, train_labels, test_features, test_labels, k, T, num_classes=1000):
    """Weighted k-NN accuracy of L2-normalised features: (top-1, top-5) in per cent.

    Features [N, D], labels [N] of class numbers from 0; `num_classes` is taken from the labels and kept for callers
    that give it. A k above the number of training images means all of them. Raises UserError for NaN or infinite
    features. Memory is bounded for any number of images, classes and neighbours.
    """
    return knn_accuracies(train_features, train_labels, test_features, test_labels, [k], T)[k]


@torch.no_grad()
def knn_accuracies(train_features, train_labels, test_features, test_labels, ks, T):
    """{k: (top-1, top-5)} as `knn_classifier` gives them for each k of a list, from one search."""
    utils.check_finite_features(train_features, test_features)
    classes, labels = torch.cat((train_labels, test_labels)).unique(return_inverse=True)  # renumbered without gaps
    train_labels, test_labels = labels.split((len(train_labels), len(test_labels)))
    rows = max(NUMBERS_AT_ONCE // max(len(train_features), len(classes)), 1)
    hits = torch.zeros(len(ks), 2, device=test_features.device)
    for chunk, target in zip(test_features.split(rows), test_labels.split(rows), strict=True):
        # Cosine similarities and labels of the nearest training images, best first: [rows, largest k].
        similarity, nearest = (chunk @ train_features.T).topk(min(max(ks), len(train_features)), dim=1)
        for i, k in enumerate(ks):
            rank = rank_of_target(similarity[:, :k], train_labels[nearest[:, :k]], target, T, classes)
            hits[i] += torch.stack(((rank < 1).sum(), (rank < min(5, k)).sum()))
    per_cent = (100.0 * hits.double().cpu() / len(test_labels)).tolist()
    return {k: tuple(accuracies) for k, accuracies in zip(ks, per_cent, strict=True)}


def rank_of_target(similarities, neighbour_labels, target, T, classes):
    """Place of the right class, 0 being the best, where neighbour j votes with weight exp(similarity_j / T): [rows].

    Labels count the sorted class numbers in `classes`. Classes with equal votes rank by their number; so do those
    without any, numbers that no image has included, as where votes are kept for all of 1000 classes.
    """
    weights = ((similarities - similarities[:, :1]) / T).exp()  # relative to the nearest: no overflow, the same ranks
    votes = weights.new_zeros(len(weights), len(classes)).scatter_add_(1, neighbour_labels, weights)
    target = target[:, None]
    votes_of_target = votes.gather(1, target)
    voted, lower = votes > 0, torch.arange(len(classes), device=votes.device) < target
    before = (votes > votes_of_target) | (voted & lower & (votes == votes_of_target))
    lower_without_votes = classes[target[:, 0]] - (voted & lower).sum(dim=1)
    return before.sum(dim=1) + torch.where(votes_of_target[:, 0] > 0, 0, lower_without_votes)


# ---- during training ----

NEIGHBOURS, TEMPERATURE = 20, 0.07


class OnlineKnn:
    """Every so many epochs of a run, the accuracy with which the teacher's features classify labelled images.

    The images are those of `knn_data`, of train/ and val/ in it or, if it has class folders only, of those, where every
    tenth image of a class asks and the others answer; without it, those of the training folder, divided like that.
    Training takes no notice: it sees the images that it would see anyway, and no label. Raises UserError if there are
    none.
    """

    def __init__(self, args, images, device):
        self.args, self.device = args, device
        inputs = utils.inputs_of(args)
        transform = dino_data.eval_transform(args.global_crops_size, inputs)
        if args.knn_data is None:
            self.sets = dino_data.held_out(images, transform, f"--data_path {args.data_path}", inputs)
        else:
            self.sets = dino_data.find_labelled(args.knn_data, transform, args.exif, "--knn_data", inputs)
        for dataset in self.sets[:2]:
            dataset.lenient = True  # what was trained for a week does not end here

    def due(self, epoch):
        """Whether the accuracy is wanted behind this epoch, counted from 0; behind the last one it always is."""
        return (epoch + 1) % self.args.knn_every == 0 or epoch + 1 == self.args.epochs

    def accuracies(self, backbone, stop=None):
        """{"knn_top1": …, "knn_top5": …} in per cent; the same on all ranks, all of which have to call it.

        Raises utils.Stopped if the StopRequest `stop` has a signal on any of them.
        """
        began, training = time.time(), backbone.training
        backbone.eval()
        how = (self.args.batch_size_per_gpu, self.args.num_workers, self.device)
        features = labelled_features(backbone, self.sets, *how, stop=stop)
        backbone.train(training)
        found = None
        if features:
            top1, top5 = knn_accuracies(*features, [NEIGHBOURS], TEMPERATURE)[NEIGHBOURS]
            found = {"knn_top1": top1, "knn_top5": top5}
        found = utils.gather_objects(found)[0]  # the others wait for rank 0 here
        utils.log(
            f"{NEIGHBOURS}-NN of the teacher, {len(self.sets[1])} images among {len(self.sets[0])}: "
            f"top-1 {found['knn_top1']:.2f} %, top-5 {found['knn_top5']:.2f} % ({time.time() - began:.0f} s)"
        )
        return found
