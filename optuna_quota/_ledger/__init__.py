"""The ledger: shares a study's quota among its workers through trial rows alone."""

from optuna_quota._ledger.dead_workers import LEASE, others_run
from optuna_quota._ledger.gpus import check_gpus_per_trial, Gpu, gpus_here
from optuna_quota._ledger.grant import left_for_trial, Refusal
from optuna_quota._ledger.heartbeat import no_waiting, RunningTrial
from optuna_quota._ledger.ledger import Ledger
from optuna_quota._ledger.status import LedgerStatus, status, stored_quota


__all__ = [
    "LEASE",
    "Gpu",
    "check_gpus_per_trial",
    "gpus_here",
    "Ledger",
    "LedgerStatus",
    "left_for_trial",
    "no_waiting",
    "others_run",
    "Refusal",
    "RunningTrial",
    "status",
    "stored_quota",
]
