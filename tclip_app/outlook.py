"""Is it worth it, and can it be trusted? What to expect of a run, from what is known without truth."""

import torch

import tclip

# Of expected_accuracy() in points, mean over the suites and the worst run: tutorials/benchmark/run.py --expected
MEAN_ERROR, LARGEST_ERROR = 10, 29


def unsaid(who, numbers, classes):
    """A sentence on the classes that `who` never says, "" where there are none. numbers: of classes, int64 (N,)."""
    times = torch.bincount(numbers, minlength=len(classes)).tolist()
    never = [name for name, count in zip(classes, times) if not count]
    if len(never) == len(classes) - 1:
        return f"{who} calls every image {classes[times.index(max(times))]}"
    return f"{who} never says {', '.join(never[:5])}: {len(never)} of {len(classes)} classes" if never else ""


def warnings(teacher, labels, student, classes):
    """Sentences on what looks bad, a list. teacher, labels, student: numbers of classes, int64 (N,)."""
    found = [unsaid("the teacher", teacher, classes), unsaid("the student", student, classes)]
    if len(labels.unique()) == 1:
        found.append(f"every label is {classes[labels[0]]}")
    shares = [torch.bincount(numbers, minlength=len(classes)) / len(numbers) for numbers in (teacher, student)]
    agreement, chance = (teacher == student).float().mean().item(), (shares[0] @ shares[1]).item()
    if agreement - chance <= 0.1 * (1 - chance):  # Cohen's kappa is at most 0.1
        found.append(f"student and teacher agree on {agreement:.1%} of the images, and would on {chance:.1%} by chance")
    return [sentence for sentence in found if sentence]


def expected_accuracy(teacher, witness, said):
    """Estimate of the share of images that is said rightly, a float, without any truth.

    teacher, witness, said: probabilities (N, C): of a student the witness are the labels, of labels it is the student.
    Halfway between two views: how often the witness makes the same choice, which is too high where all err together,
    and the mean probability of what is chosen, which is often too low: by the teacher where it chooses the same, since
    the witness is surer for the same reason, and by the witness elsewhere. A teacher that is certain of all tells no
    confidences: it counts as far as tclip.verdict() believes it.
    """
    sure = teacher.amax(1)
    if (sure[sure > teacher.amin(1)] > 0.999).all():  # even answers are none
        teacher = teacher.clamp_min(1e-6)
        teacher = (tclip.verdict(teacher, teacher, enough=torch.inf)[0] * teacher.log()).softmax(1)
    choice = said.argmax(1, keepdim=True)  # (N, 1)
    agree = teacher.argmax(1, keepdim=True) == choice
    given = torch.where(agree, teacher.gather(1, choice), witness.gather(1, choice))
    return ((witness.argmax(1, keepdim=True) == choice).float().mean() + given.mean()).item() / 2


def summary(teacher, labels, student, classes):
    """What a summary.json holds of it, a dict: expected_accuracy of student and labels, outlook, a sentence, warnings.

    teacher, labels, student: probabilities (N, C) of the C classes.
    """
    ours, theirs = expected_accuracy(teacher, labels, student), expected_accuracy(teacher, student, labels)
    sentence = (
        f"Expect the student to be right on some {ours:.0%} of these images, the labels on {theirs:.0%}: estimates "
        f"without truth. The first was {MEAN_ERROR} points off in the mean of our benchmarks, {LARGEST_ERROR} at worst."
    )
    told = warnings(*(said.argmax(1) for said in (teacher, labels, student)), classes)
    return dict(expected_student_accuracy=ours, expected_label_accuracy=theirs, outlook=sentence, warnings=told)
