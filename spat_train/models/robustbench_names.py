"""RobustBench's model names (Croce et al., arXiv 2010.09670): the networks of this package that compute the same functions.

`robustbench:[DATASET/][THREAT/]NAME`, as the folders there: "Carmon2019Unlabeled", "L2/Rice2020Overfitting". Where a name alone
stands for several entries, the number of classes picks the data set, and Linf comes before L2 and corruptions.
"""

from typing import NamedTuple

from ..errors import did_you_mean

PREFIX = "robustbench:"
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
THREATS = ("Linf", "L2", "corruptions")
Numbers = tuple[float, float, float]
NORMALISATIONS: dict[str, tuple[Numbers, Numbers] | None] = {  # mean and std; the names are those of the first that used them
    "-": None,
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # none, in the place of torchvision's own
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "engstrom": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "rony": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "augustin": (
        (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
        (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
    ),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "chen": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "wu": (
        (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
    ),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# data set and threat model, network, normalisation: names
TABLE = """
cifar10/Linf preactresnet-18/raw-no-bn - Andriushchenko2020Understanding
cifar10/Linf wrn-28-10 - Carmon2019Unlabeled Sehwag2020Hydra Wang2020Improving Wu2020Adversarial_extra Zhang2020Geometry
cifar10/Linf wrn-28-10 - Sridhar2021Robust Standard
cifar10/Linf wrn-28-10 half Hendrycks2019Using
cifar10/Linf wrn-34-20 cifar10 Rice2020Overfitting
cifar10/Linf wrn-34-10 - Zhang2019Theoretically Huang2020Self Zhang2019You Zhang2020Attacks Wu2020Adversarial Sehwag2021Proxy
cifar10/Linf wrn-34-10 - Sitawarin2020Improving Cui2020Learnable_34_10 Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10
cifar10/Linf wrn-34-10 - Jia2022LAS-AT_34_10 Addepalli2022Efficient_WRN_34_10 Cui2023Decoupled_WRN-34-10 Chen2024Data_WRN_34_10
cifar10/Linf resnet-50/cifar engstrom Engstrom2019Robustness
cifar10/Linf preactresnet-18/raw-no-bn cifar10 Wong2020Fast
cifar10/Linf dm-wrn-70-16 cifar10 Gowal2020Uncovering_70_16 Gowal2020Uncovering_70_16_extra Rebuffi2021Fixing_70_16_cutmix_ddpm
cifar10/Linf dm-wrn-70-16 cifar10 Rebuffi2021Fixing_70_16_cutmix_extra Gowal2021Improving_70_16_ddpm_100m
cifar10/Linf dm-wrn-70-16 cifar10 Pang2022Robustness_WRN70_16 Wang2023Better_WRN-70-16
cifar10/Linf dm-wrn-34-20 cifar10 Gowal2020Uncovering_34_20
cifar10/Linf dm-wrn-28-10 cifar10 Gowal2020Uncovering_28_10_extra Rebuffi2021Fixing_28_10_cutmix_ddpm Rade2021Helper_ddpm
cifar10/Linf dm-wrn-28-10 cifar10 Gowal2021Improving_28_10_ddpm_100m Pang2022Robustness_WRN28_10 Wang2023Better_WRN-28-10
cifar10/Linf dm-wrn-28-10 cifar10 Xu2023Exploring_WRN-28-10 Cui2023Decoupled_WRN-28-10
cifar10/Linf resnet-18/cifar - Sehwag2021Proxy_R18 Addepalli2021Towards_RN18 Addepalli2022Efficient_RN18
cifar10/Linf wrn-34-10 cifar10 Chen2020Efficient
cifar10/Linf wrn-34-20 - Cui2020Learnable_34_20 Chen2021LTD_WRN34_20 Chen2024Data_WRN_34_20
cifar10/Linf dm-wrn-106-16 cifar10 Rebuffi2021Fixing_106_16_cutmix_ddpm
cifar10/Linf wrn-34-15 - Sridhar2021Robust_34_15
cifar10/Linf dm-preactresnet-18 cifar10 Rebuffi2021Fixing_R18_ddpm Rade2021Helper_R18_extra Rade2021Helper_R18_ddpm
cifar10/Linf dm-preactresnet-18 cifar10 Gowal2021Improving_R18_ddpm_100m
cifar10/Linf dm-wrn-34-10 cifar10 Rade2021Helper_extra
cifar10/Linf wrn-70-16 - Jia2022LAS-AT_70_16
cifar10/Linf dm-wrn-94-16 cifar10 Bartoldson2024Adversarial_WRN-94-16
cifar10/Linf dm-wrn-82-8 cifar10 Bartoldson2024Adversarial_WRN-82-8
cifar10/L2 resnet-50/cifar augustin Augustin2020Adversarial
cifar10/L2 resnet-50/cifar engstrom Engstrom2019Robustness
cifar10/L2 preactresnet-18/activated cifar10 Rice2020Overfitting
cifar10/L2 wrn-28-10 rony Rony2019Decoupling
cifar10/L2 wrn-28-10 - Standard
cifar10/L2 wrn-34-10 - Wu2020Adversarial Sehwag2021Proxy
cifar10/L2 dm-wrn-70-16 cifar10 Gowal2020Uncovering Gowal2020Uncovering_extra Rebuffi2021Fixing_70_16_cutmix_ddpm
cifar10/L2 dm-wrn-70-16 cifar10 Rebuffi2021Fixing_70_16_cutmix_extra Wang2023Better_WRN-70-16
cifar10/L2 resnet-18/cifar - Sehwag2021Proxy_R18
cifar10/L2 dm-wrn-28-10 cifar10 Rebuffi2021Fixing_28_10_cutmix_ddpm Wang2023Better_WRN-28-10
cifar10/L2 wrn-34-10 augustin Augustin2020Adversarial_34_10 Augustin2020Adversarial_34_10_extra
cifar10/L2 dm-preactresnet-18 cifar10 Rebuffi2021Fixing_R18_cutmix_ddpm Rade2021Helper_R18_ddpm
cifar10/corruptions dm-wrn-70-16 cifar10 Rebuffi2021Fixing_70_16_cutmix_extra_Linf Rebuffi2021Fixing_70_16_cutmix_extra_L2
cifar10/corruptions wrn-40-2 half Hendrycks2020AugMix_WRN
cifar10/corruptions preactresnet-18/activated cifar10 Kireev2021Effectiveness_Gauss50percent Kireev2021Effectiveness_AugMixNoJSD
cifar10/corruptions preactresnet-18/activated cifar10 Kireev2021Effectiveness_RLAT Kireev2021Effectiveness_RLATAugMixNoJSD
cifar10/corruptions preactresnet-18/activated cifar10 Kireev2021Effectiveness_RLATAugMix
cifar10/corruptions wrn-28-10 - Standard
cifar10/corruptions wrn-34-10 - Addepalli2021Towards_WRN34 Addepalli2022Efficient_WRN_34_10
cifar10/corruptions resnet-18/cifar half Modas2021PRIMEResNet18
cifar100/Linf dm-wrn-70-16 cifar100 Gowal2020Uncovering Gowal2020Uncovering_extra Rebuffi2021Fixing_70_16_cutmix_ddpm
cifar100/Linf dm-wrn-70-16 cifar100 Pang2022Robustness_WRN70_16 Wang2023Better_WRN-70-16
cifar100/Linf wrn-34-20 - Cui2020Learnable_34_20_LBGAT6 Jia2022LAS-AT_34_20
cifar100/Linf wrn-34-10 - Cui2020Learnable_34_10_LBGAT0 Cui2020Learnable_34_10_LBGAT6 Sehwag2021Proxy Sitawarin2020Improving
cifar100/Linf wrn-34-10 - Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 Jia2022LAS-AT_34_10 Addepalli2022Efficient_WRN_34_10
cifar100/Linf wrn-34-10 - Cui2020Learnable_34_10_LBGAT9_eps_8_255 Cui2023Decoupled_WRN-34-10 Cui2023Decoupled_WRN-34-10_autoaug
cifar100/Linf wrn-34-10 - Chen2024Data_WRN_34_10
cifar100/Linf wrn-34-10 chen Chen2020Efficient
cifar100/Linf wrn-34-10 wu Wu2020Adversarial
cifar100/Linf wrn-28-10 half Hendrycks2019Using
cifar100/Linf preactresnet-18/activated wu Rice2020Overfitting
cifar100/Linf dm-wrn-28-10 cifar100 Rebuffi2021Fixing_28_10_cutmix_ddpm Pang2022Robustness_WRN28_10 Wang2023Better_WRN-28-10
cifar100/Linf dm-wrn-28-10 cifar100 Cui2023Decoupled_WRN-28-10
cifar100/Linf dm-preactresnet-18 cifar100 Rebuffi2021Fixing_R18_ddpm Rade2021Helper_R18_ddpm
cifar100/Linf preactresnet-18/activated - Addepalli2021Towards_PARN18
cifar100/Linf resnet-18/cifar - Addepalli2022Efficient_RN18
cifar100/corruptions dm-wrn-70-16 cifar100 Gowal2020Uncovering_Linf Gowal2020Uncovering_extra_Linf
cifar100/corruptions wrn-40-2 half Hendrycks2020AugMix_WRN
cifar100/corruptions preactresnet-18/activated - Addepalli2021Towards_PARN18
cifar100/corruptions wrn-34-10 - Addepalli2021Towards_WRN34 Addepalli2022Efficient_WRN_34_10
cifar100/corruptions resnet-18/cifar half Modas2021PRIMEResNet18
imagenet/Linf resnet-50/imagenet imagenet Wong2020Fast Engstrom2019Robustness Salman2020Do_R50 Standard_R50
imagenet/Linf resnet-18/imagenet imagenet Salman2020Do_R18
imagenet/Linf torchvision:wide_resnet50_2 imagenet Salman2020Do_50_2
imagenet/Linf timm:convnext_base imagenet Liu2023Comprehensive_ConvNeXt-B
imagenet/Linf timm:convnext_large imagenet Liu2023Comprehensive_ConvNeXt-L
imagenet/Linf convnext-t-convstem - Singh2023Revisiting_ConvNeXt-T-ConvStem
imagenet/Linf convnext-s-convstem - Singh2023Revisiting_ConvNeXt-S-ConvStem
imagenet/Linf convnext-b-convstem - Singh2023Revisiting_ConvNeXt-B-ConvStem
imagenet/Linf convnext-l-convstem - Singh2023Revisiting_ConvNeXt-L-ConvStem
imagenet/Linf vit-s-convstem imagenet Singh2023Revisiting_ViT-S-ConvStem
imagenet/Linf vit-b-convstem - Singh2023Revisiting_ViT-B-ConvStem
imagenet/Linf torchvision:wide_resnet50_2 unit Chen2024Data_WRN_50_2
imagenet/Linf timm:vit_base_patch16_224 imagenet Mo2022When_ViT-B
imagenet/corruptions resnet-50/imagenet imagenet Erichson2022NoisyMix Erichson2022NoisyMix_new Geirhos2018_SIN
imagenet/corruptions resnet-50/imagenet imagenet Geirhos2018_SIN_IN Geirhos2018_SIN_IN_IN Hendrycks2020Many Hendrycks2020AugMix
imagenet/corruptions resnet-50/imagenet imagenet Standard_R50
imagenet/corruptions torchvision:wide_resnet50_2 imagenet Salman2020Do_50_2_Linf
"""
OTHERS = {  # entries whose architecture we do not have
    "XCiT": "Debenedetti2022Light_XCiT-S12 Debenedetti2022Light_XCiT-M12 Debenedetti2022Light_XCiT-L12",
    "Swin": "Liu2023Comprehensive_Swin-B Liu2023Comprehensive_Swin-L Mo2022When_Swin-B RodriguezMunoz2024Characterizing_Swin-B "
    "RodriguezMunoz2024Characterizing_Swin-L Xu2024MIMIR_Swin-B Xu2024MIMIR_Swin-L",
    "DeiT": "Tian2022Deeper_DeiT-S Tian2022Deeper_DeiT-B",
    "AlexNet": "AlexNet",
    "ResNeSt-152": "Sehwag2021Proxy_ResNest152",
    "ResNeXt": "Hendrycks2020AugMix_ResNeXt",
    "ResNet-18 of twice the width": "Diffenderfer2021Winning_LRR Diffenderfer2021Winning_Binary",
    "WideResNet with other groups": "Huang2021Exploring Huang2021Exploring_ema Huang2022Revisiting_WRN-A4 Peng2023Robust",
    "WideResNet with activations that have parameters": "Dai2021Parameterizing",
    "WideResNet that normalises its features": "Pang2020Boosting",
    "WideResNet that normalises each image by its own mean": "Ding2020MMA",
    "network with sparsified features": "Amini2024MeanSparse_Ra_WRN_70_16 Amini2024MeanSparse_S-WRN-94-16 "
    "Amini2024MeanSparse_S-WRN-70-16 Amini2024MeanSparse_ConvNeXt-L Amini2024MeanSparse_Swin-L",
    "WideResNet with a neural ODE": "Kang2021Stable",
    "ensemble": "Chen2020Adversarial Diffenderfer2021Winning_LRR_CARD_Deck Diffenderfer2021Winning_Binary_CARD_Deck "
    "Bai2023Improving_edm Bai2023Improving_trades Bai2024MixedNUTS",
}


class Entry(NamedTuple):
    """A network of this package, by its name, and the mean and std in front of it (None: none)."""

    dataset: str
    threat: str
    network: str
    normalisation: tuple[Numbers, Numbers] | None


def _read_table() -> dict[str, list[Entry]]:
    entries: dict[str, list[Entry]] = {}
    for line in TABLE.split("\n")[1:-1]:
        where, network, numbers, *names = line.split()
        dataset, threat = where.split("/")
        entry = Entry(dataset, threat, network, NORMALISATIONS[numbers])
        for name in names:
            entries.setdefault(name, []).append(entry)
    return entries


ENTRIES = _read_table()


def resolve(name: str, num_classes: int) -> Entry:
    """The entry of `robustbench:[DATASET/][THREAT/]NAME`.

    Raises:
        ValueError: there is none, its network is none of ours, or `num_classes` leaves open which it is.
    """
    *folders, short = name.removeprefix(PREFIX).split("/")
    if short in (kinds := {name: kind for kind, names in OTHERS.items() for name in names.split()}):
        raise ValueError(f"name={name!r}: its {kinds[short]} is none of ours: give its own code as package.module:factory")
    if short not in ENTRIES:
        networks = sorted({entry.network for entries in ENTRIES.values() for entry in entries})
        known = f"{len(ENTRIES)} are known, of {', '.join(networks)} (robustbench_names.py lists them)"
        raise ValueError(f"name={name!r}: RobustBench has no such model: {did_you_mean(short, [*ENTRIES, *kinds])}{known}")
    every = ENTRIES[short]
    found = [e for e in every if folders in ([], [e.dataset], [e.threat], [e.dataset, e.threat])]
    if not found:
        places = ", ".join(f"{entry.dataset}/{entry.threat}" for entry in every)
        raise ValueError(f"name={name!r}: RobustBench has it in {places} only: give {PREFIX}{every[0].dataset}/{short}")
    fitting = [entry for entry in found if CLASSES[entry.dataset] == num_classes] or found
    if len({entry.dataset for entry in fitting}) > 1 and len({entry[2:] for entry in fitting}) > 1:
        datasets = " or ".join(dict.fromkeys(f"{PREFIX}{entry.dataset}/{short}" for entry in fitting))
        raise ValueError(f"name={name!r}: num_classes={num_classes} leaves open which data set it is of: give {datasets}")
    return min(fitting, key=lambda entry: THREATS.index(entry.threat))


def network_name(name: str, num_classes: int) -> str:
    """`name`, or the name of the network that an entry of RobustBench has."""
    return resolve(name, num_classes).network if name.startswith(PREFIX) else name
