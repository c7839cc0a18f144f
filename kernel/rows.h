// The routines of every kind of cell.
#pragma once
#include "cfc.h"
#include "gru.h"
#include "ligru.h"
#include "lstm.h"
#include "mingru.h"
#include "minlstm.h"
#include "rnn.h"
#include "slstm.h"
