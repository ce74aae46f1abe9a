# Fails where a kernel object offers the linker more than its table, or has code that runs at load.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only --extern-only ${object} OUTPUT_VARIABLE symbols
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
  list(LENGTH symbols count)
  execute_process(COMMAND ${OBJDUMP} -h ${object} OUTPUT_VARIABLE sections COMMAND_ERROR_IS_FATAL ANY)
  if(NOT count EQUAL 1 OR sections MATCHES "\\.(init_array|ctors)")
    message(FATAL_ERROR "${object} must define its table alone, and run nothing at load: ${symbols}")
  endif()
endforeach()
