"""Statistics of ranks, for `cepo.eval.statistics.estimates`: correlations, and areas under the ROC curve."""

from __future__ import annotations

import numpy as np


def rank_correlations(values: np.ndarray, others: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation of each column with each of the others, in each of B samples.

    Copies of an observation share their mean rank, as ties do, so this is the correlation of the resampled data.

    Args:
        values: (N,) or (N, M).
        others: (N,) or (N, K).
        weights_BN: how often each observation counts.

    Returns:
        (B, M, K), where M or K is 1 for a single column; NaN if a column is constant.
    """
    units = [_unit_ranks(columns.reshape(len(columns), -1), weights_BN) for columns in (values, others)]
    found: np.ndarray = units[0] @ units[1].transpose(0, 2, 1)
    return found


def aucs(values: np.ndarray, positive_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the probability that a positive has a larger value than a negative, counting ties half.

    Args:
        values: the scores, (N,) or (N, M).
        positive_N: above 0.5 if the observation is a positive.
        weights_BN: how often each observation counts.

    Returns:
        (B, M) areas under the ROC curve, in [0, 1]; NaN if a sample lacks one of the classes.
    """
    ranks_BMN = _ranks(values.reshape(len(values), -1), weights_BN)
    chosen_BN = weights_BN * (positive_N > 0.5)
    positives_B1 = chosen_BN.sum(1, keepdims=True)
    pairs_B1 = positives_B1 * (weights_BN.sum(1, keepdims=True) - positives_B1)
    wins_BM = (ranks_BMN * chosen_BN[:, None]).sum(-1) - positives_B1 * (positives_B1 + 1) / 2
    found: np.ndarray = wins_BM / np.where(pairs_B1 > 0.0, pairs_B1, np.nan)
    return found


def _unit_ranks(columns_NM: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the ranks (B, M, N), centred, weighted and scaled to length 1; NaN if a column is constant."""
    ranks_BMN = _ranks(columns_NM, weights_BN)
    # The mean rank of a sample of n is (n + 1) / 2, with or without ties.
    centred_BMN = ranks_BMN - (weights_BN.sum(1)[:, None, None] + 1.0) / 2.0
    weighted_BMN = centred_BMN * np.sqrt(weights_BN)[:, None]
    length_BM1 = np.linalg.norm(weighted_BMN, axis=-1, keepdims=True)
    scaled: np.ndarray = weighted_BMN / np.where(length_BM1 > 0.0, length_BM1, np.nan)
    return scaled


def _ranks(columns_NM: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the ranks (B, M, N), from 1, of each column's values in each resampled data set; ties get their mean."""
    ranks_BMN = np.empty((len(weights_BN), columns_NM.shape[1], len(columns_NM)))
    for at, values_N in enumerate(columns_NM.T):
        order_N = np.argsort(values_N, kind="stable")
        _, starts, tie_N = np.unique(values_N[order_N], return_index=True, return_inverse=True)
        counts_BU = np.add.reduceat(weights_BN[:, order_N], starts, axis=1)
        ranks_BMN[:, at, order_N] = (counts_BU.cumsum(1) - counts_BU / 2.0 + 0.5)[:, tie_N]
    return ranks_BMN
