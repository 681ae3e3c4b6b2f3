# SPDX-License-Identifier: Apache-2.0
"""
The messages of VMMs, kernels and guests about failures: one catalogue.

``ramblock explain`` prints its entries; the readers of traces recognise by them what a log tells of
mappings and conversions that failed.
"""
