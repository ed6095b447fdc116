"""Secure aggregation: an aggregator learns the sum of its devices' vectors, and nothing else about any of them.

SecAgg+ (Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", protocol of
section 4 with the consistency check of the active adversary; on a sparse graph as in Bell et al. 2020, "Secure
Single-Server Aggregation with (Poly)Logarithmic Overhead", section 3). Both sides are state machines without I/O; who
uses them signs, verifies, sends, receives and keeps.

::

    device (client.Client)                               aggregator (server.Server)
      SendKeys        ----- keys, signed ----------------->  KeysArrived        of all that are invited
      RosterArrived   <---- roster, neighbours' keys ------  SendRoster
      SendShares      ----- sealed shares, per neighbour ->  SharesArrived
      SharesArrived   <---- those addressed to it ---------  SendShares
      ApplyMasks, then the masked vector ----------------->  MaskedStored       CloseMasking when the time is up
      SurvivorsArrived <--- names ------------------------  SendSurvivors
      SendAgreement   ----- digest of them, signed ------->  AgreementArrived
      AgreementsArrived <-- neighbours' signatures -------  SendAgreements
      SendReveal      ----- one share per neighbour ------>  RevealArrived
                                                             Unmask             see unmask.py

Messages may be lost, repeated and delayed: a device repeats its last one on Tick, and the aggregator answers each
repeat with what it had answered before.
"""
