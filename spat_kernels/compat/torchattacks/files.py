"""Attacks on whole data sets, saved to files and loaded from them."""

import os
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ...checks import check_choice
from ...normalize import Normalize
from ...predictions import model_logits, predictions
from .pixels import to_type


class Files:
    """The part of `Attack` that saves and loads."""

    model_of_pixels: Any

    def attack_pixels(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def save(
        self, data_loader, save_path: str | os.PathLike | None = None, verbose: bool = True, return_verbose: bool = False,
        save_predictions: bool = False, save_clean_inputs: bool = False, save_type: str = "float",
    ):  # fmt: skip
        """Attack the batches (images, labels) of `data_loader`; save what comes out, in [0, 1] or as uint8 ("int").

        Returns:
            tuple | None: with `return_verbose`, the robust accuracy in percent, the mean L2 distance, in pixels, of the images
            that were broken (NaN without any), and the seconds that the attacks took.
        """
        check_choice("save_type", save_type, ("float", "int"))
        right, lengths, kept, seconds = [], [], [], 0.0
        for number, (inputs, labels) in enumerate(data_loader, 1):
            began = time.perf_counter()
            clean, adversarial = self.attack_pixels(inputs, labels)
            seconds += time.perf_counter() - began
            found = predictions(model_logits(self.model_of_pixels, adversarial))
            right.append(found == labels.to(found.device))
            lengths.append((adversarial - clean).flatten(1).norm(dim=1)[~right[-1]])
            accuracy = 100 * int(torch.cat(right).sum()) / sum(map(len, right))
            distance = float(torch.cat(lengths).mean())
            if verbose:
                share = f"{100 * number / len(data_loader):.2f} % / " if hasattr(data_loader, "__len__") else ""
                print(f"- Save progress: {share}Robust accuracy: {accuracy:.2f} % / L2: {distance:.5f} ({seconds:.3f} s)")
            if save_path is not None:
                batch = {"adv_inputs": to_type(adversarial, save_type), "labels": labels}
                batch |= {"preds": found} if save_predictions else {}
                batch |= {"clean_inputs": to_type(clean, save_type)} if save_clean_inputs else {}
                kept.append({name: t.detach().cpu() for name, t in batch.items()})
        if not right:
            raise ValueError("data_loader is empty: give batches (images, labels)")
        if save_path is not None:
            content: dict[str, Any] = {name: torch.cat([batch[name] for batch in kept]) for name in kept[0]}
            torch.save(content | {"save_type": save_type}, save_path)
        return (accuracy, distance, seconds) if return_verbose else None

    @staticmethod
    def load(
        load_path: str | os.PathLike, batch_size: int = 128, shuffle: bool = False, normalize=None,
        load_predictions: bool = False, load_clean_inputs: bool = False,
    ) -> DataLoader:  # fmt: skip
        """A loader of what `save` wrote: adversarial images, labels, and what else is asked for, in this order.

        Args:
            normalize: {"mean": ..., "std": ...}, a number for each channel, to normalise the images by.
        """
        content = torch.load(load_path, weights_only=True)
        names = ["adv_inputs", "labels"] + ["preds"] * load_predictions + ["clean_inputs"] * load_clean_inputs
        if lacking := [name for name in names if name not in content]:
            raise ValueError(
                f"load_path={load_path}: it has no {', '.join(lacking)}: save with save_predictions or save_clean_inputs"
            )
        for name in {"adv_inputs", "clean_inputs"} & content.keys():
            content[name] = to_type(content[name], "float")
            if normalize is not None:
                content[name] = Normalize(normalize["mean"], normalize["std"])(content[name])
        return DataLoader(TensorDataset(*(content[name] for name in names)), batch_size=batch_size, shuffle=shuffle)
