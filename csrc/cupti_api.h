// The functions of CUPTI that the recorder calls, found at run time.
#pragma once

#include <cupti.h>

#include <memory>
#include <string>
#include <vector>

#include "shared_library.h"

namespace llmkern {

struct CuptiApi {
  // `library` is the file to take and no other; empty looks for one, `candidates` first.
  CuptiApi(const std::vector<std::string>& candidates, const std::string& library);

  // Throws RecorderError with a sentence about `what` unless `result` is success.
  void check(CUptiResult result, const char* what) const;
  std::string error_name(CUptiResult result) const;
  // The plain name of an API call (cudaLaunchKernel for cudaLaunchKernel_v7000), empty for an unknown id.
  std::string callback_name(CUpti_CallbackDomain domain, CUpti_CallbackId id) const;

  SharedLibrary library;
  uint32_t version = 0;

  decltype(&cuptiGetVersion) get_version;
  decltype(&cuptiGetResultString) get_result_string;
  decltype(&cuptiGetErrorMessage) get_error_message;
  decltype(&cuptiGetTimestamp) get_timestamp;
  decltype(&cuptiSubscribe) subscribe;
  decltype(&cuptiUnsubscribe) unsubscribe;
  decltype(&cuptiEnableCallback) enable_callback;
  decltype(&cuptiGetCallbackName) get_callback_name;
  decltype(&cuptiActivityEnable) enable;
  decltype(&cuptiActivityDisable) disable;
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks;
  decltype(&cuptiActivityGetNextRecord) get_next_record;
  decltype(&cuptiActivityGetNumDroppedRecords) get_num_dropped_records;
  decltype(&cuptiActivityFlushAll) flush_all;
  decltype(&cuptiActivitySetAttribute) set_attribute;
  decltype(&cuptiSetThreadIdType) set_thread_id_type;
};

}  // namespace llmkern
